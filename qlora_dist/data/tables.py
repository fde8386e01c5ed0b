"""Tables become raw examples row by row: CSV, with the delimiter that its header shows, and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_dist.data.opening import BOM, COMPRESSED, MAX_EXAMPLE_BYTES, Example, open_bytes, span, suffix
from qlora_dist.data.record import Reject

DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = ";\t|,"
MAX_HEADER_BYTES = 2**16

NO_UTF8 = re.compile("[\udc80-\udcff]")
"""What stands for a byte that is no UTF-8: one such row is left out, the others are read."""


def delimiter(path: Path) -> str:
    """Returns what stands between the columns of a CSV file: of its kind's own and `;`, tab, `|` what its header has.

    Its own comes first; where none is there, the file has one column.
    """
    own = DELIMITERS[suffix(path)]
    with open_bytes(path) as file:
        header = file.readline(MAX_HEADER_BYTES).removeprefix(BOM).decode(errors="replace")
    found = Counter(c for c in re.sub('"[^"]*"', "", header) if c in OTHER_DELIMITERS)
    return own if own in found or not found else max(found, key=lambda c: found[c])


def column_names(path: Path) -> list[str]:
    """Returns the header of a CSV file."""
    csv.field_size_limit(MAX_EXAMPLE_BYTES)
    with _as_text(open_bytes(path), is_start=True) as file:
        return next(csv.reader(file, delimiter=delimiter(path)), [])


def read_csv(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    """Yields the rows of a piece of a CSV file; those that don't have its columns are rejected.

    Raises:
        ValueError: if the header can't be used.
    """
    names = column_names(path)
    _check_header(names)
    before = _lines_before(path, start)
    with _as_text(span(path, start, end), is_start=not start) as file:
        rows = csv.DictReader(file, names if start else None, delimiter=delimiter(path))
        for row in rows:
            line, values = before + rows.line_num, "".join(v for v in row.values() if isinstance(v, str))
            if None in row or None in row.values():
                detail = f"expected {len(names)}"
                yield Reject(file=str(path), line=line, reason="wrong number of columns", detail=detail)
            elif not values.isascii() and (wrong := NO_UTF8.search(values)):
                detail = f"byte 0x{ord(wrong.group()) - 0xDC00:02x}; {as_utf8('LATIN1')}"
                yield Reject(file=str(path), line=line, reason="not UTF-8", detail=detail)
            else:
                yield line, row


def as_utf8(encoding: str) -> str:
    """Returns how a file of another encoding is written anew."""
    return f"write it as UTF-8, e.g. iconv -f {encoding} -t UTF-8"


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


def read_parquet(path: Path, start: int, end: int) -> Iterator[Example | Reject]:
    """Yields the rows of the row groups of a Parquet file that start within a piece of it."""
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


def head(path: Path) -> str:
    """Returns what every piece of a file depends on besides its own bytes: a CSV's header, a Parquet file's schema."""
    if suffix(path) in DELIMITERS and path.suffix not in COMPRESSED:
        return repr([delimiter(path), *column_names(path)])
    if suffix(path) == ".parquet":
        import pyarrow.parquet

        return str(pyarrow.parquet.read_schema(path))
    return ""


def _as_text(file: BinaryIO, *, is_start: bool) -> io.TextIOWrapper:
    encoding = "utf-8-sig" if is_start else "utf-8"
    return io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline="")


def _check_header(names: list[str]) -> None:
    if twice := [name for name, number in Counter(names).items() if name and number > 1]:
        raise ValueError(f"two columns are named {twice[0]!r}")
    if any(NO_UTF8.search(name) for name in names):
        raise ValueError(f"its header is not UTF-8; {as_utf8('LATIN1')}")


def _lines_before(path: Path, start: int) -> int:
    """Counts lines as the csv module does: a return ends one too."""
    number, is_after_return = 0, False
    with path.open("rb") as file:
        while start > 0 and (block := file.read(min(start, 2**24))):
            number += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            number -= is_after_return and block.startswith(b"\n")
            is_after_return = block.endswith(b"\r")
            start -= len(block)
    return number
