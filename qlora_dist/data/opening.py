"""A source file is opened plain or decompressed, whole or a span of its bytes."""

from __future__ import annotations

import codecs
import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

Example = tuple[int, Any]
"""The line (or row, or entry) of a file, counted from 1, and the raw example there."""

MAX_EXAMPLE_BYTES = 64 * 2**20
"""A single example that is longer is rejected, not read into memory."""

BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst")


def suffix(path: Path) -> str:
    """Returns a file's format by its name, compression set aside: `corpus.jsonl.gz` is `.jsonl`."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix.lower()


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressed."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


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


def skip_to(file: BinaryIO, start: int) -> int:
    """Moves to byte `start` and returns the number of lines before it."""
    number = 0
    while start > 0 and (block := file.read(min(start, 2**24))):
        number += block.count(b"\n")
        start -= len(block)
    return number


def is_utf16(path: Path) -> bool:
    """Says whether a file begins with the mark of UTF-16 or UTF-32, as some programs of Windows write text."""
    with open_bytes(path) as file:
        return file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
