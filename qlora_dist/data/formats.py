"""A file becomes raw examples, one by one: JSON lines, JSON, Parquet, CSV, text; plain, gzip or zstd.

Nothing here holds more than one example and a buffer.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from qlora_dist.data.json_stream import WRAPPED, JsonStream, MalformedError
from qlora_dist.data.opening import (
    BOM,
    COMPRESSED,
    MAX_EXAMPLE_BYTES,
    Example,
    is_utf16,
    open_bytes,
    skip_to,
    span,
    suffix,
)
from qlora_dist.data.record import Reject
from qlora_dist.data.tables import as_utf8, read_csv, read_parquet

DOCUMENT_BYTES = 2**22
"""A text file is one document; of a longer one, each such stretch (up to a line end) is."""

UNREADABLE = "unreadable file"
"""The reason of a reject that stands for the rest of a file."""


def read_examples(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    """Yields the raw examples of a file, and a reject for each piece of it that can't be read.

    Files are read from byte `start` to `end`, which are borders of examples (see `divide`); compressed ones and JSON
    documents are read whole.
    """
    reader = READERS[suffix(path)]
    try:
        if reader is not read_parquet and is_utf16(path):
            raise ValueError(f"it is UTF-16; {as_utf8('UTF-16')}")
        yield from reader(path, start, end)
    except (OSError, EOFError, ValueError, csv.Error, zlib.error, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        yield Reject(file=str(path), line=0, reason=UNREADABLE, detail=reason)


def _json_lines(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    left = end - start if end and path.suffix not in COMPRESSED else None
    with open_bytes(path) as file:
        number = skip_to(file, start)
        while left is None or left > 0:
            line = file.readline(MAX_EXAMPLE_BYTES + 1)
            if not line:
                return
            number += 1
            size = len(line)
            if size > MAX_EXAMPLE_BYTES and not line.endswith(b"\n"):
                size += _skip_line(file)
                detail = f"more than {MAX_EXAMPLE_BYTES >> 20} MiB"
                yield Reject(file=str(path), line=number, reason="line too long", detail=detail)
            elif line.strip():
                yield _parsed(path, number, line)
            left = left - size if left is not None else None


def _parsed(path: Path, number: int, line: bytes) -> Example | Reject:
    reason, detail = "broken JSON", "nested too deep"
    try:
        return number, json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reason, detail = "not UTF-8", str(error)[:120]
    except RecursionError:
        pass
    except ValueError as error:
        is_array = number == 1 and line.lstrip().startswith(b"[")
        detail = "an array of examples belongs in a file named .json" if is_array else str(error)[:120]
    return Reject(file=str(path), line=number, reason=reason, detail=detail)


def _skip_line(file: BinaryIO) -> int:
    skipped = 0
    while block := file.readline(2**20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def _json(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    """Yields the entries of a JSON array (also one named `data`), or the one value, or JSON lines so named."""
    if _are_lines(path):
        yield from _json_lines(path, 0, 0)
        return
    with open_bytes(path) as file:
        stream = JsonStream(codecs.getreader("utf-8-sig")(file), MAX_EXAMPLE_BYTES)
        number = 0
        try:
            for number, value in enumerate(stream.entries(), start=1):
                yield number, value
        except MalformedError as error:
            detail = f"entry {number + 1}: {str(error)[:120]}"
            yield Reject(file=str(path), line=number + 1, reason=UNREADABLE, detail=detail)


def _are_lines(path: Path) -> bool:
    """Says whether the first line is an object of its own, and not one that wraps an array `data`."""
    with open_bytes(path) as file:
        start = file.readline(2**16).removeprefix(BOM)
        if not start.lstrip().startswith(b"{") or WRAPPED.match(start.lstrip().decode(errors="replace")):
            return False
        line = start if start.endswith(b"\n") else start + file.readline(MAX_EXAMPLE_BYTES)
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _text(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    with path.open("rb") as file:
        line = 1 + skip_to(file, start)
    with span(path, start, end) as file:
        while document := file.read(DOCUMENT_BYTES):
            if len(document) == DOCUMENT_BYTES:
                document += end_of_document(file)
            try:
                text = document.decode("utf-8-sig" if not start and line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield Reject(file=str(path), line=line, reason="not UTF-8", detail=str(error)[:120])
            else:
                if text.strip():
                    yield line, text
            line += document.count(b"\n")


def end_of_document(file: BinaryIO) -> bytes:
    """Reads the rest of a document that fills `DOCUMENT_BYTES`: its last line, or of an endless one a good piece."""
    rest = file.readline(DOCUMENT_BYTES)
    while not rest.endswith(b"\n") and (more := cast(io.BufferedReader, file).peek(1)[:1]) and more[0] & 0xC0 == 0x80:
        rest += file.read(1)  # never the middle of a letter
    return rest


READERS: dict[str, Callable[[Path, int, int], Iterator[Example | Reject]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": _text,
    ".md": _text,
}
