"""Files of lines are divided into blocks of whole lines, so that several processes read them at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 2**24
MOST_BLOCKS = 1024
"""Of a corpus above 16 GiB, blocks are larger rather than more."""


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes `start` to `end` of a file: `num` lines, of which the first has number `first` among those of all files."""

    number: int
    path: Path
    start: int
    end: int
    first: int
    num: int

    def lines(self) -> Iterator[bytes]:
        """Yields its lines, one by one."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for _ in range(self.num):
                yield file.readline()

    def offsets(self) -> Iterator[tuple[int, bytes]]:
        """Yields its lines with the byte of the block at which each starts."""
        at = 0
        for line in self.lines():
            yield at, line
            at += len(line)

    def line_at(self, offset: int) -> bytes:
        """Returns the line that starts at this byte of the block."""
        with self.path.open("rb") as file:
            file.seek(self.start + offset)
            return file.readline()


def blocks_of(paths: Sequence[Path]) -> list[Block]:
    """Divides files into blocks of about `BLOCK_BYTES`; empty files have none. Each file ends with a line end."""
    size = max(BLOCK_BYTES, sum(path.stat().st_size for path in paths) // MOST_BLOCKS)
    blocks: list[Block] = []
    first = 0
    for path in paths:
        for start, end, num in _spans(path, size):
            blocks.append(Block(len(blocks), path, start, end, first, num))
            first += num
    return blocks


def join_files(parts: Iterable[Path], whole: Path) -> None:
    """Writes files one after another into one, and removes each once it is written."""
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file, 2**20)
            part.unlink()


def _spans(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """Yields start, end and number of lines of each block of a file."""
    start = end = num = 0
    with path.open("rb") as file:
        while piece := file.read(min(size, 2**20)):
            num += piece.count(b"\n")
            end += len(piece)
            if end - start >= size:
                rest = b"" if piece.endswith(b"\n") else file.readline()
                end += len(rest)
                yield start, end, num + bool(rest)
                start, num = end, 0
    if end > start:
        yield start, end, num
