"""Large files are divided over parts where one example ends and the next begins.

JSON lines are divided at line ends, CSV at the ends of records (quoted line ends are none), Parquet between row groups,
text between its documents. A JSON document and compressed files are read from their beginning, so each is one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from qlora_dist.data.formats import DOCUMENT_BYTES, end_of_document
from qlora_dist.data.opening import BOM, COMPRESSED, suffix
from qlora_dist.data.tables import delimiter, row_group_starts

SCANNED_BYTES = 2**24
QUOTE, COMMA, LINE_END, RETURN = b'",\n\r'


def borders(path: Path, part_bytes: int) -> list[int]:
    """Returns where a file is divided: 0, the byte of each border, and its size. Pieces have `part_bytes` or more."""
    size = path.stat().st_size
    divide = None if path.suffix in COMPRESSED or size <= part_bytes else DIVIDERS.get(suffix(path))
    inner = divide(path, part_bytes, size) if divide else []
    return [0, *(border for border in inner if len(BOM) < border < size), size]


def can_be_divided(path: Path) -> bool:
    """Says whether files of this kind are divided."""
    return path.suffix not in COMPRESSED and suffix(path) in DIVIDERS


def _lines(path: Path, part_bytes: int, size: int) -> list[int]:
    found, start = [], 0
    with path.open("rb") as file:
        while start + part_bytes < size:
            file.seek(start + part_bytes - 1)
            while (block := file.readline(2**20)) and not block.endswith(b"\n"):
                pass
            start = file.tell()
            found.append(start)
    return found


def _documents(path: Path, part_bytes: int, size: int) -> list[int]:
    found, start, at = [], 0, 0
    with path.open("rb") as file:
        while at + DOCUMENT_BYTES < size:
            file.seek(at + DOCUMENT_BYTES)
            at += DOCUMENT_BYTES + len(end_of_document(file))
            if at - start >= part_bytes:
                found.append(at)
                start = at
    return found


def _row_groups(path: Path, part_bytes: int, size: int) -> list[int]:
    found, start = [], 0
    for group in row_group_starts(path):
        if group - start >= part_bytes:
            found.append(group)
            start = group
    return found


def _csv_records(path: Path, part_bytes: int, size: int) -> list[int]:
    """Returns line ends outside of quotes, one for each `part_bytes`; none if the quotes leave a doubt.

    Where every opening quote follows a delimiter, a line end or its double, and every closing quote stands before one,
    a line end is outside of quotes if an even number of them lies before it. A quote anywhere else is a letter to the
    csv module: then the file isn't divided.
    """
    beside = np.zeros(256, dtype=bool)
    beside[[ord(delimiter(path)), LINE_END, RETURN, QUOTE]] = True
    found: list[int] = []
    start = num_quotes = 0
    with path.open("rb") as file:
        for at in range(0, size, SCANNED_BYTES):
            file.seek(max(0, at - 1))
            bytes_N = np.frombuffer((b"" if at else b"\n") + file.read(SCANNED_BYTES + 1 + (at > 0)), dtype=np.uint8)
            if not at and bytes_N[1:4].tobytes() == BOM:
                bytes_N = np.concatenate([np.full(4, LINE_END, dtype=np.uint8), bytes_N[4:]])
            inner = bytes_N[1 : SCANNED_BYTES + 1]
            quotes = np.flatnonzero(inner == QUOTE)
            is_opening = (np.arange(len(quotes)) + num_quotes) % 2 == 0
            after = np.append(bytes_N, np.uint8(LINE_END))[quotes + 2]
            if not (beside[bytes_N[quotes]] | ~is_opening).all() or not (beside[after] | is_opening).all():
                return []
            ends = np.flatnonzero(inner == LINE_END)
            ends = ends[(np.searchsorted(quotes, ends) + num_quotes) % 2 == 0] + at + 1
            while len(ends := ends[ends >= start + part_bytes]):
                start = int(ends[0])
                found.append(start)
            num_quotes += len(quotes)
    return found if num_quotes % 2 == 0 else []


DIVIDERS: dict[str, Callable[[Path, int, int], list[int]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _row_groups,
    ".txt": _documents,
    ".md": _documents,
}
