"""Copies are found by MinHash LSH over the records' signatures, with some 50 bytes of memory a record.

N records, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qlora_dist.data.signatures import NUM_HASHES, Index
from qlora_dist.data.words import mix

NEIGHBOURS = 16
"""In a bucket, a record is compared with this many before it."""

COMPARED_AT_ONCE = 2**14


def exact_copies(words: np.ndarray) -> np.ndarray:
    """Returns for each record [N] the first one with the same words; -1 for that one itself."""
    _, first, inverse = np.unique(words, return_index=True, return_inverse=True)
    earlier = first[inverse]
    earlier[earlier == np.arange(len(words))] = -1
    return np.asarray(earlier)


def near_copies(index: Index, copy_of: np.ndarray, threshold: float, scratch: Path) -> np.ndarray:
    """Returns for each record [N] an earlier one that it is a copy of, near ones included; -1 where there is none.

    A record's fate depends on earlier records alone, so what is appended to a corpus changes nothing before it.
    What is kept holds no two records that are near.
    """
    copy_of = copy_of.copy()
    for later, earlier in near_pairs(index, copy_of, threshold, scratch):
        order = np.lexsort((earlier, later))
        first = np.flatnonzero(np.diff(later[order], prepend=-1))
        copy_of[later[order][first]] = earlier[order][first]
    return copy_of


def clusters(index: Index, copy_of: np.ndarray, threshold: float, scratch: Path) -> np.ndarray:
    """Returns for each record [N] the first one of its cluster: all that near-copies link, one by one."""
    parent = np.where(copy_of < 0, np.arange(len(copy_of)), copy_of).tolist()

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for later, earlier in near_pairs(index, copy_of, threshold, scratch):
        for a, b in zip(later.tolist(), earlier.tolist(), strict=True):
            first, second = sorted((root(a), root(b)))
            parent[second] = first
    return np.array([root(i) for i in range(len(parent))], dtype=np.int64)


def near_pairs(
    index: Index, copy_of: np.ndarray, threshold: float, scratch: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pairs ([P] later, [P] earlier) whose estimated Jaccard similarity is at least `threshold`, band by band.

    Candidates share a band of the signature (Leskovec et al., Mining of Massive Datasets, 3.4); the share of equal
    hashes then decides. Records that `copy_of` calls copies by then are left out: it may be filled in meanwhile.
    """
    rows = band_rows(threshold)
    for band in _write_bands(index, rows, scratch):
        key = np.fromfile(band, dtype=np.uint64)
        band.unlink()
        open_ = np.flatnonzero(copy_of < 0)
        order = open_[np.argsort(key[open_], kind="stable")]
        key = key[order]
        for distance in range(1, min(NEIGHBOURS, len(key) - 1) + 1):
            same = np.flatnonzero(key[distance:] == key[:-distance])
            if not len(same):
                break
            earlier, later = order[same], order[same + distance]
            near = _similarity(index, earlier, later) >= threshold
            if near.any():
                yield later[near], earlier[near]


def band_rows(threshold: float) -> int:
    """Returns the most rows a band can have so that a pair at the threshold is missed once in a thousand times."""
    fitting = (r for r in range(16, 1, -1) if (1 - threshold**r) ** (NUM_HASHES // r) <= 1e-3)
    return next(fitting, 1)


def _write_bands(index: Index, rows: int, scratch: Path) -> list[Path]:
    """Writes the key of each record in each band to a file a band, in one pass over the signatures."""
    scratch.mkdir(parents=True, exist_ok=True)
    paths = [scratch / f"band-{i}" for i in range(NUM_HASHES // rows)]
    files = [path.open("wb") for path in paths]
    for _, entries in index.chunks():
        for i, file in enumerate(files):
            key = np.full(len(entries), i, dtype=np.uint64)
            for column in range(i * rows, (i + 1) * rows):
                key = mix(key ^ entries["signature"][:, column].astype(np.uint64))
            file.write(key.tobytes())
    for file in files:
        file.close()
    return paths


def _similarity(index: Index, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shares = np.zeros(len(a))
    for start in range(0, len(a), COMPARED_AT_ONCE):
        part = slice(start, start + COMPARED_AT_ONCE)
        shares[part] = (index.signatures(a[part]) == index.signatures(b[part])).mean(axis=1)
    return shares
