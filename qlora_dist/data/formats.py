"""A file becomes raw examples, one by one: JSON lines, JSON, Parquet, CSV, text; plain, gzip or zstd."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qlora_dist.data.record import Reject

Example = tuple[int, Any]
"""The line (or row, or entry) of a file, counted from 1, and the raw example there."""

MAX_EXAMPLE_BYTES = 64 * 2**20
"""A single example that is longer is rejected, not read into memory."""


def suffix(path: Path) -> str:
    """Returns a file's format by its name, compression set aside: `corpus.jsonl.gz` is `.jsonl`."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix.lower()


def read_examples(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    """Yields the raw examples of a file, and a reject for each piece of it that can't be read.

    Only JSON lines can be read from `start` to `end`, which stand at line ends; the others are read whole.
    """
    reader = READERS[suffix(path)]
    try:
        yield from reader(path, start, end)
    except (OSError, EOFError, ValueError, csv.Error, RecursionError) as error:
        yield Reject(file=str(path), line=0, reason="unreadable file", detail=str(error)[:200])


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressed."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _json_lines(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    with open_bytes(path) as file:
        number = _skip_to(file, start)
        at = start
        while True:
            line = file.readline(MAX_EXAMPLE_BYTES + 1)
            if not line:
                return
            number += 1
            at += len(line)
            if len(line) > MAX_EXAMPLE_BYTES and not line.endswith(b"\n"):
                at += _skip_line(file)
                wanted = f"more than {MAX_EXAMPLE_BYTES >> 20} MiB"
                yield Reject(file=str(path), line=number, reason="line too long", detail=wanted)
            elif line.strip():
                yield _parsed(path, number, line)
            if end and at >= end and path.suffix not in COMPRESSED:
                return


def _parsed(path: Path, number: int, line: bytes) -> Example | Reject:
    try:
        return number, json.loads(line)
    except UnicodeDecodeError as error:
        return Reject(file=str(path), line=number, reason="not UTF-8", detail=str(error)[:120])
    except RecursionError:
        return Reject(file=str(path), line=number, reason="broken JSON", detail="nested too deep")
    except ValueError as error:
        return Reject(file=str(path), line=number, reason="broken JSON", detail=str(error)[:120])


def _skip_to(file: BinaryIO, start: int) -> int:
    """Moves to byte `start` and returns the number of lines before it."""
    number = 0
    while start > 0:
        block = file.read(min(start, 2**24))
        if not block:
            break
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
    with open_bytes(path) as file:
        try:
            value = json.load(file)
        except ValueError:  # JSON lines under another name
            yield from _json_lines(path, 0, 0)
            return
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    yield from enumerate(value if isinstance(value, list) else [value], start=1)


def _parquet(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _csv(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    csv.field_size_limit(MAX_EXAMPLE_BYTES)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            if None in row or None in row.values():
                wanted = f"{len(rows.fieldnames or [])} columns"
                yield Reject(file=str(path), line=rows.line_num, reason="wrong columns", detail=f"expected {wanted}")
            else:
                yield rows.line_num, row


def _text(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    with open_bytes(path) as file:
        raw = file.read()
    try:
        yield 1, raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Reject(file=str(path), line=1, reason="not UTF-8", detail=str(error)[:120])


COMPRESSED = (".gz", ".zst")
READERS: dict[str, Callable[[Path, int, int], Iterator[Example | Reject]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _text,
}
