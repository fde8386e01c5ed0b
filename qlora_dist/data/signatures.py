"""Each record has an index entry: its id, the hash of its words, and a MinHash signature of its 5-word runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_dist.data.record import Record
from qlora_dist.data.words import gram_hashes, mix, word_hashes

NUM_HASHES = 128
SHINGLE_WORDS = 5
SEED = 20_481
INDEX = "index.bin"
ENTRY = np.dtype([("id", "<u8"), ("words", "<u8"), ("signature", "<u4", (NUM_HASHES,))])
"""One entry of `index.bin`; entry i belongs to line i of `records.jsonl`."""


def index_entries(records: Sequence[Record], seed: int = SEED) -> np.ndarray:
    """Returns the entries of these records (MinHash: Broder 1997; signatures by rensa)."""
    from rensa import RMinHash

    entries = np.zeros(len(records), dtype=ENTRY)
    entries["id"] = [int(record.id, 16) for record in records]
    words = [word_hashes(record.whole()) for record in records]
    entries["words"] = [_one_hash(w) for w in words]
    grams = [gram_hashes(w, SHINGLE_WORDS) for w in words]
    offsets = np.cumsum([0, *map(len, grams)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(grams), offsets, NUM_HASHES, seed)
    entries["signature"] = np.array(matrix.to_rows(), dtype=np.uint32)
    return entries


def read_index(folder: Path) -> np.ndarray:
    """Memory-maps the index of a part."""
    path = folder / INDEX
    if not path.stat().st_size:
        return np.zeros(0, dtype=ENTRY)
    return np.memmap(path, dtype=ENTRY, mode="r")


def _one_hash(words: np.ndarray) -> np.uint64:
    positions = mix(np.arange(1, len(words) + 1, dtype=np.uint64))
    return np.uint64(mix(np.array([(words * (positions | np.uint64(1))).sum(dtype=np.uint64)]))[0])
