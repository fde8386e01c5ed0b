"""A file becomes raw examples, one by one: JSON lines, JSON, Parquet, CSV, text; plain, gzip or zstd.

Nothing here holds more than one example and a buffer.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qlora_dist.data.json_stream import WRAPPED, JsonStream, MalformedError
from qlora_dist.data.record import Reject

Example = tuple[int, Any]
"""The line (or row, or entry) of a file, counted from 1, and the raw example there."""

MAX_EXAMPLE_BYTES = 64 * 2**20
"""A single example that is longer is rejected, not read into memory."""

DOCUMENT_BYTES = 2**22
"""A text file is one document; of a longer one, each such stretch (up to a line end) is."""

BOM = b"\xef\xbb\xbf"
DELIMITERS = {".csv": ord(","), ".tsv": ord("\t")}

UNREADABLE = "unreadable file"
"""The reason of a reject that stands for the rest of a file."""

COMPRESSED = (".gz", ".zst")


def suffix(path: Path) -> str:
    """Returns a file's format by its name, compression set aside: `corpus.jsonl.gz` is `.jsonl`."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix.lower()


def read_examples(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    """Yields the raw examples of a file, and a reject for each piece of it that can't be read.

    Files are read from byte `start` to `end`, which are borders of examples (see `divide`); compressed ones and JSON
    documents are read whole.
    """
    reader = READERS[suffix(path)]
    try:
        yield from reader(path, start, end)
    except (OSError, EOFError, ValueError, csv.Error, zlib.error, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        yield Reject(file=str(path), line=0, reason=UNREADABLE, detail=reason)


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressed."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _json_lines(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    left = end - start if end and path.suffix not in COMPRESSED else None
    with open_bytes(path) as file:
        number = _skip_to(file, start)
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
        detail = str(error)[:120]
    return Reject(file=str(path), line=number, reason=reason, detail=detail)


def span(path: Path, start: int, end: int) -> BinaryIO:
    """Opens bytes `start` to `end` of a plain file, or a compressed one whole."""
    file = open_bytes(path)
    if path.suffix in COMPRESSED:
        return file
    file.seek(start)
    return cast(BinaryIO, io.BufferedReader(_Span(file, end - start)))


class _Span(io.RawIOBase):
    """The next so many bytes of a file."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file, self._left = file, num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        read = cast(io.BufferedReader, self._file).readinto(view)
        self._left -= read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines_before(path: Path, start: int) -> int:
    with path.open("rb") as file:
        return _skip_to(file, start)


def _csv_lines_before(path: Path, start: int) -> int:
    """Counts lines as the csv module does: a return ends one too."""
    number, is_after_return = 0, False
    with path.open("rb") as file:
        while start > 0 and (block := file.read(min(start, 2**24))):
            number += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            number -= is_after_return and block.startswith(b"\n")
            is_after_return = block.endswith(b"\r")
            start -= len(block)
    return number


def _skip_to(file: BinaryIO, start: int) -> int:
    """Moves to byte `start` and returns the number of lines before it."""
    number = 0
    while start > 0 and (block := file.read(min(start, 2**24))):
        number += block.count(b"\n")
        start -= len(block)
    return number


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


def row_group_starts(path: Path) -> list[int]:
    """Returns the byte at which each row group of a Parquet file starts, in order; none if they aren't in order."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    except (OSError, ValueError):  # a torn file is the reader's matter
        return []
    columns = ([group.column(i) for i in range(group.num_columns)] for group in groups)
    starts = [min(c.dictionary_page_offset or c.data_page_offset for c in each) for each in columns]
    return starts if starts == sorted(set(starts)) else []


def head(path: Path) -> str:
    """Returns what every piece of a file depends on besides its own bytes: a CSV's header, a Parquet file's schema."""
    if suffix(path) in DELIMITERS and path.suffix not in COMPRESSED:
        return repr(_column_names(path))
    if suffix(path) == ".parquet":
        import pyarrow.parquet

        return str(pyarrow.parquet.read_schema(path))
    return ""


def _parquet(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        starts = row_group_starts(path) or [0] * file.metadata.num_row_groups
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        chosen = [i for i, at in enumerate(starts) if start <= at < end or not at]
        number = sum(sizes[: chosen[0]]) if chosen else 0
        for batch in file.iter_batches(batch_size=256, row_groups=chosen):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _csv(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    csv.field_size_limit(MAX_EXAMPLE_BYTES)
    names = _column_names(path) if start else None
    before = _csv_lines_before(path, start)
    with io.TextIOWrapper(span(path, start, end), encoding="utf-8" if start else "utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, names, delimiter=chr(DELIMITERS[suffix(path)]))
        for row in rows:
            line = before + rows.line_num
            if None in row or None in row.values():
                detail = f"expected {len(rows.fieldnames or [])}"
                yield Reject(file=str(path), line=line, reason="wrong number of columns", detail=detail)
            else:
                yield line, row


def _column_names(path: Path) -> list[str]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="", errors="replace") as file:
        return next(csv.reader(file, delimiter=chr(DELIMITERS[suffix(path)])), [])


def _text(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    line = 1 + _lines_before(path, start)
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
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
    ".md": _text,
}
