"""Arrays and buckets on disk, for what would grow with the corpus: memory holds what is worked on alone.

N entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class DiskArray:
    """An array on disk, read and written in pieces; several processes may write different pieces at once.

    It isn't memory-mapped: pages of a map count as the process's memory.
    """

    path: Path
    dtype: np.dtype

    def __len__(self) -> int:
        return self.path.stat().st_size // self.dtype.itemsize

    @classmethod
    def make(cls, path: Path, dtype: np.dtype | str, size: int) -> DiskArray:
        """Makes an array of zeros."""
        array = cls(path, np.dtype(dtype))
        with path.open("wb") as file:
            file.truncate(size * array.dtype.itemsize)
        return array

    def read(self, first: int, num: int) -> np.ndarray:
        """Returns entries `first` to `first + num`."""
        return np.fromfile(self.path, self.dtype, num, offset=first * self.dtype.itemsize)

    def write(self, first: int, values: np.ndarray) -> None:
        """Writes entries from `first` on."""
        with self.path.open("r+b") as file:
            file.seek(first * self.dtype.itemsize)
            file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())

    def get(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the entries of these numbers [N], each read by itself."""
        size = self.dtype.itemsize
        with self.path.open("rb") as file:
            handle = file.fileno()
            raw = [os.pread(handle, size, size * number) for number in numbers.tolist()]
        return np.frombuffer(b"".join(raw), dtype=self.dtype)

    def put(self, numbers: np.ndarray, values: np.ndarray) -> None:
        """Writes the entries of these numbers [N], each by itself."""
        size, raw = self.dtype.itemsize, np.ascontiguousarray(values, dtype=self.dtype).tobytes()
        with self.path.open("r+b") as file:
            handle = file.fileno()
            for i, number in enumerate(numbers.tolist()):
                os.pwrite(handle, raw[i * size : (i + 1) * size], size * number)

    def chunks(self, num: int = 2**16) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the entries a few at a time, with the number of the first."""
        for first in range(0, len(self), num):
            yield first, self.read(first, num)


class BucketWriter:
    """Entries are dealt to buckets, in files of its own: one file for each `SPILL` entries, sorted by bucket.

    What shares a key meets in one bucket, whoever wrote it; a bucket is read on its own, so it may be as small as
    memory wants.
    """

    SPILL = 2**20

    def __init__(self, name: Path, dtype: np.dtype, num_buckets: int) -> None:
        self._name, self._dtype, self._num_buckets = name, dtype, num_buckets
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._num = 0
        self.paths: list[Path] = []

    def add(self, entries: np.ndarray, bucket_N: np.ndarray) -> None:
        """Takes entries [N] and the bucket of each [N]."""
        self._held.append((entries, bucket_N.astype(np.uint32)))
        self._num += len(entries)
        if self._num >= self.SPILL:
            self.close()

    def close(self) -> list[Path]:
        """Writes what is left; returns the files, in the order in which entries came."""
        if self._num:
            entries, bucket_N = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
            order = np.argsort(bucket_N, kind="stable")
            ends = np.searchsorted(bucket_N[order], np.arange(self._num_buckets + 1))
            path = self._name.with_name(f"{self._name.name}.{len(self.paths)}")
            with path.open("wb") as file:
                file.write(ends.astype("<i8").tobytes())
                file.write(entries[order].astype(self._dtype).tobytes())
            self.paths.append(path)
        self._held, self._num = [], 0
        return self.paths


def read_buckets(paths: Iterable[Path], bucket: int, num_buckets: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields the entries of one bucket, those of one file after another."""
    for path in paths:
        low, high = np.fromfile(path, "<i8", 2, offset=8 * bucket).tolist()
        if high > low:
            yield np.fromfile(path, dtype, high - low, offset=8 * (num_buckets + 1) + low * dtype.itemsize)


def read_bucket(paths: Iterable[Path], bucket: int, num_buckets: int, dtype: np.dtype) -> np.ndarray:
    """Returns all entries of one bucket, in the order of the files."""
    return np.concatenate([np.zeros(0, dtype=dtype), *read_buckets(paths, bucket, num_buckets, dtype)])


def buckets_for(num: int, in_memory: int = 2**19, least: int = 8) -> int:
    """Returns a power of two: enough buckets for about `in_memory` entries in each, and for several workers."""
    if num <= 2**16:
        return 1
    return max(least, 1 << max(0, (num - 1) // in_memory).bit_length())


def bucket_of(hash_N: np.ndarray, num_buckets: int) -> np.ndarray:
    """Returns the bucket of each evenly scattered 64-bit hash [N], by its highest bits."""
    bits = num_buckets.bit_length() - 1
    return hash_N >> np.uint64(64 - bits) if bits else np.zeros(len(hash_N), dtype=np.uint64)
