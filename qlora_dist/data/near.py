"""Copies are found by MinHash LSH over the records' signatures, with a few bytes of memory a record."""

from __future__ import annotations

import numpy as np

from qlora_dist.data.words import mix

LEADERS = 16
"""In a bucket, each record is compared with at most this many earlier ones."""


def exact_copies(words: np.ndarray) -> np.ndarray:
    """Returns for each record the first one with the same words: itself where there is none."""
    _, first, inverse = np.unique(words, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])


def near_pairs(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Returns pairs [P, 2] (later, earlier) of records whose estimated Jaccard similarity is at least `threshold`.

    Candidates share a band of the signature (Leskovec et al., Mining of Massive Datasets, 3.4); the share of equal
    hashes then decides. Pairs are sorted.
    """
    rows = band_rows(threshold, signatures.shape[1])
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, signatures.shape[1] - rows + 1, rows):
        found.append(_band_pairs(signatures, start, rows, threshold))
    return np.unique(np.concatenate(found), axis=0)


def band_rows(threshold: float, num_hashes: int) -> int:
    """Returns the most rows a band can have so that a pair at the threshold is missed once in a thousand times."""
    for rows in range(16, 1, -1):
        if 1 - (1 - threshold**rows) ** (num_hashes // rows) >= 0.999:
            return rows
    return 1


def keep_first(num_records: int, pairs: np.ndarray) -> np.ndarray:
    """Returns for each record the earlier kept one that it is near to: itself where it is kept.

    Records are taken in order, so that a record's fate depends on earlier ones alone: what is appended to a corpus
    never changes what was kept before.
    """
    owner = np.arange(num_records)
    for later, earlier in pairs.tolist():
        if owner[later] == later and owner[earlier] == earlier:
            owner[later] = earlier
    return owner


def clusters(num_records: int, pairs: np.ndarray) -> np.ndarray:
    """Returns for each record the first one of its connected cluster."""
    parent = list(range(num_records))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for later, earlier in pairs.tolist():
        a, b = root(later), root(earlier)
        parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(num_records)], dtype=np.int64)


def _band_pairs(signatures: np.ndarray, start: int, rows: int, threshold: float) -> np.ndarray:
    key = np.zeros(len(signatures), dtype=np.uint64)
    for column in range(start, start + rows):
        key = mix(key ^ signatures[:, column].astype(np.uint64))
    order = np.lexsort((np.arange(len(key)), key))
    sorted_key = key[order]
    pairs = []
    for distance in range(1, LEADERS + 1):
        same = np.flatnonzero(sorted_key[distance:] == sorted_key[:-distance]) if distance < len(key) else []
        if not len(same):
            break
        earlier, later = order[same], order[np.asarray(same) + distance]
        near = _similarity(signatures, earlier, later) >= threshold
        pairs.append(np.stack([later[near], earlier[near]], axis=1))
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64)


def _similarity(signatures: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shares = np.zeros(len(a))
    for start in range(0, len(a), 65536):
        part = slice(start, start + 65536)
        shares[part] = (signatures[a[part]] == signatures[b[part]]).mean(axis=1)
    return shares
