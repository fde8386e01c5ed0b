"""Copies are found by MinHash LSH over the records' signatures, bucket by bucket on disk.

Memory holds a chunk of the index or one bucket of a band, whatever the size of the corpus; disk, some 250 bytes a
record beside the index. N records, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from qlora_dist.data.disk import BucketWriter, DiskArray, bucket_of, buckets_for, read_bucket
from qlora_dist.data.signatures import HEAD, NUM_HASHES, Chunk, Index
from qlora_dist.data.words import mix
from qlora_dist.data.workers import Workers

NEIGHBOURS = 16
"""In a bucket, a record is compared with this many before it."""

COMPARED_AT_ONCE = 2**14
SPAN = 2**18
KEYED = np.dtype([("key", "<u8"), ("number", "<i8")])
WORDS = -1
"""The number of the band that holds the hash of all words."""

Pairs = tuple[np.ndarray, np.ndarray]
"""Numbers of records, [P] later and [P] earlier."""


@dataclass(frozen=True, slots=True)
class CopySearch:
    """Looks for copies among all records of an index, with arrays of its own in `folder`."""

    index: Index
    threshold: float
    folder: Path

    @property
    def heads(self) -> DiskArray:
        """The entries of the index without their signatures [N]."""
        return DiskArray(self.folder / "heads", HEAD)

    @property
    def copy_of(self) -> DiskArray:
        """The earlier record that each is a copy of [N]; -1 where there is none."""
        return DiskArray(self.folder / "copy_of", np.dtype("<i8"))

    def prepare(self, workers: Workers) -> None:
        """Writes the heads, and the key of each record in each band, in one pass over the index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        size = len(self.index)
        DiskArray.make(self.heads.path, HEAD, size)
        DiskArray.make(self.copy_of.path, "<i8", size)
        for band in range(WORDS, self.num_bands):
            DiskArray.make(self._keys(band).path, "<u8", size)
        for _ in workers.map(self._write_keys, self.index.chunks()):
            pass

    def drop_exact(self, workers: Workers) -> None:
        """Fills `copy_of` for each record with the same words as an earlier one: the first of them."""
        for later, earlier in self._in_buckets(WORDS, "equals", workers):
            self.copy_of.put(later, earlier)

    def drop_near(self, workers: Workers) -> None:
        """Fills `copy_of` for each record that is near to an earlier one, which may itself be a copy.

        A record's fate depends on earlier records alone, so what is appended to a corpus changes nothing before it.
        What is kept holds no two records that are near.
        """
        for band in range(self.num_bands):
            for later, earlier in self._in_buckets(band, "firsts", workers):
                self.copy_of.put(later, earlier)

    def leaders(self, workers: Workers) -> np.ndarray:
        """Returns for each record [N] the first one of its cluster: all that near-copies link, one by one.

        The array is memory-mapped, 8 bytes a record.
        """
        path = self.folder / "leaders"
        leader: np.ndarray = np.memmap(path, dtype=np.int64, mode="w+", shape=len(self.index))
        for first, copies in self.copy_of.chunks():
            leader[first : first + len(copies)] = np.where(copies < 0, np.arange(first, first + len(copies)), copies)
        bands = (self._in_buckets(band, "pairs", workers) for band in range(self.num_bands))
        for later, earlier in chain.from_iterable(bands):
            _link(leader, later, earlier)
        for first in range(0, len(leader), SPAN):
            numbers = np.arange(first, min(len(leader), first + SPAN))
            leader[numbers] = _roots(leader, numbers)
        return leader

    @property
    def num_bands(self) -> int:
        """How many bands a signature has."""
        return NUM_HASHES // band_rows(self.threshold)

    def _keys(self, band: int) -> DiskArray:
        return DiskArray(self.folder / f"band-{band}", np.dtype("<u8"))

    def _write_keys(self, chunk: Chunk) -> None:
        entries = chunk.entries()
        self.heads.write(chunk.first, entries[list(HEAD.names or ())])
        self.copy_of.write(chunk.first, np.full(len(entries), -1))
        self._keys(WORDS).write(chunk.first, mix(entries["words"]))
        rows = band_rows(self.threshold)
        for band in range(self.num_bands):
            key = np.full(len(entries), band, dtype=np.uint64)
            for column in range(band * rows, (band + 1) * rows):
                key = mix(key ^ entries["signature"][:, column].astype(np.uint64))
            self._keys(band).write(chunk.first, key)

    def _in_buckets(self, band: int, what: str, workers: Workers) -> Iterator[Pairs]:
        """Yields the pairs of each bucket of a band: what shares a key meets there."""
        num_buckets = buckets_for(len(self.index))
        spans = [(band, first) for first in range(0, len(self.index), SPAN)]
        paths: list[Path] = list(chain.from_iterable(workers.map(self._deal, spans)))
        self._keys(band).path.unlink()
        tasks = [(what, paths, bucket, num_buckets) for bucket in range(num_buckets)]
        yield from workers.map(self._pairs_of, tasks)
        for path in paths:
            path.unlink()

    def _deal(self, span: tuple[int, int]) -> list[Path]:
        """Deals the records of a span that are no copies yet to the buckets of a band."""
        band, first = span
        key = self._keys(band).read(first, SPAN)
        open_ = np.flatnonzero(self.copy_of.read(first, SPAN) < 0)
        entries = np.zeros(len(open_), dtype=KEYED)
        entries["key"], entries["number"] = key[open_], open_ + first
        num_buckets = buckets_for(len(self.index))
        writer = BucketWriter(self.folder / f"bucket-{band}-{first}", KEYED, num_buckets)
        writer.add(entries, bucket_of(entries["key"], num_buckets))
        return writer.close()

    def _pairs_of(self, task: tuple[str, list[Path], int, int]) -> Pairs:
        what, paths, bucket, num_buckets = task
        entries = read_bucket(paths, bucket, num_buckets, KEYED)
        entries = entries[np.argsort(entries["key"], kind="stable")]
        if what == "equals":
            return _equals(entries["key"], entries["number"])
        later, earlier = self._near(entries["key"], entries["number"])
        if what == "firsts":
            order = np.lexsort((earlier, later))
            later, earlier = later[order], earlier[order]
            is_first = np.diff(later, prepend=-1) != 0
            later, earlier = later[is_first], earlier[is_first]
        return later, earlier

    def _near(self, key: np.ndarray, number: np.ndarray) -> Pairs:
        """Returns pairs of equal keys whose estimated Jaccard similarity is at least the threshold.

        Candidates share a band of the signature (Leskovec et al., Mining of Massive Datasets, 3.4); the share of equal
        hashes then decides.
        """
        none = np.zeros(0, dtype=np.int64)
        found: list[Pairs] = [(none, none)]
        for distance in range(1, min(NEIGHBOURS, len(key) - 1) + 1):
            same = np.flatnonzero(key[distance:] == key[:-distance])
            if not len(same):
                break
            earlier, later = number[same], number[same + distance]
            near = self._similarity(earlier, later) >= self.threshold
            found.append((later[near], earlier[near]))
        later, earlier = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return later, earlier

    def _similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        shares = np.zeros(len(a))
        for start in range(0, len(a), COMPARED_AT_ONCE):
            part = slice(start, start + COMPARED_AT_ONCE)
            shares[part] = (self.index.signatures(a[part]) == self.index.signatures(b[part])).mean(axis=1)
        return shares


def band_rows(threshold: float) -> int:
    """Returns the most rows a band can have so that a pair at the threshold is missed once in a thousand times."""
    fitting = (r for r in range(16, 1, -1) if (1 - threshold**r) ** (NUM_HASHES // r) <= 1e-3)
    return next(fitting, 1)


def _equals(key: np.ndarray, number: np.ndarray) -> Pairs:
    """Returns for each record but the first of each run of equal keys (sorted) that first one."""
    starts = np.flatnonzero(np.diff(key, prepend=key[:1] + np.uint64(1)) != 0)
    first = np.repeat(number[starts], np.diff(np.append(starts, len(key))))
    is_later = number != first
    return number[is_later], first[is_later]


def _link(leader: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Joins the trees of all pairs, under the least root (Shiloach and Vishkin 1982, hooking and jumping)."""
    while len(a):
        a, b = _roots(leader, a), _roots(leader, b)
        differs = a != b
        a, b = np.minimum(a, b)[differs], np.maximum(a, b)[differs]
        # of several hooks of one root the least wins; the others are linked in the next round
        order = np.lexsort((a, b))
        is_first = np.diff(b[order], prepend=-1) != 0
        leader[b[order][is_first]] = a[order][is_first]


def _roots(leader: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    while True:
        above = leader[numbers]
        if (above == numbers).all():
            return np.asarray(numbers)
        numbers = above
