"""Each record has an index entry: its id, a hash of its words, and a MinHash signature of its 5-word runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qlora_dist.data.record import Record
from qlora_dist.data.words import WordHashes, mix

NUM_HASHES = 128
RUN_WORDS = 5
SEED = 20_481
INDEX = "index.bin"
CHUNK = 2**15
ENTRY = np.dtype([("id", "<u8"), ("words", "<u8"), ("context", "<u8"), ("signature", "<u4", (NUM_HASHES,))])
"""One entry of `index.bin`; entry i belongs to line i of `records.jsonl`."""


def index_entries(records: Sequence[Record]) -> np.ndarray:
    """Returns the entries of these records (MinHash: Broder 1997; signatures by rensa).

    Signatures are of what a record says of its own: a context that several questions are about makes no copies of
    them, but records on different contexts are never near. A text shorter than a run is one run; one without words
    (nothing but punctuation) is known by its id.
    """
    from rensa import RMinHash

    entries = np.zeros(len(records), dtype=ENTRY)
    entries["id"] = [int(record.id, 16) for record in records]
    words, contexts = (WordHashes([f(r) for r in records]) for f in (Record.whole, Record.context))
    entries["words"] = np.where(words.num_N > 0, words.wholes(), mix(entries["id"]))
    entries["context"] = np.where(contexts.num_N > 0, contexts.wholes(), 0)
    own = WordHashes([record.own() for record in records])
    runs, texts = own.runs(RUN_WORDS)
    runs ^= entries["context"][texts]
    short = np.flatnonzero(own.num_N < RUN_WORDS)
    runs, texts = np.concatenate([runs, entries["words"][short]]), np.concatenate([texts, short])
    order = np.argsort(texts, kind="stable")
    offsets = np.searchsorted(texts[order], np.arange(len(records) + 1)).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(runs[order], offsets, NUM_HASHES, SEED)
    entries["signature"] = np.array(matrix.to_rows(), dtype=np.uint32)
    return entries


class Index:
    """The entries of all parts of a domain, in order; signatures stay on disk."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._files = [(folder / INDEX).open("rb") for folder in folders]
        lengths = [os.fstat(file.fileno()).st_size // ENTRY.itemsize for file in self._files]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        names = ("id", "words", "context")
        heads = [[entries[name].copy() for name in names] for _, entries in self.chunks()]
        empty = np.zeros(0, dtype="<u8")
        self.ids, self.words, self.contexts = (np.concatenate([empty, *(h[i] for h in heads)]) for i in range(3))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the entries a few at a time, with the number of the first."""
        start = 0
        for file in self._files:
            file.seek(0)
            while len(entries := np.frombuffer(file.read(CHUNK * ENTRY.itemsize), dtype=ENTRY)):
                yield start, entries
                start += len(entries)

    def signatures(self, records: np.ndarray) -> np.ndarray:
        """Reads the signatures of these records [N] into an array [N, NUM_HASHES]."""
        numbers, inverse = np.unique(records, return_inverse=True)
        found = np.zeros((len(numbers), NUM_HASHES), dtype=np.uint32)
        parts = np.searchsorted(self._ends, numbers, side="right")
        skipped = np.append(0, self._ends)[parts]
        head = ENTRY.itemsize - 4 * NUM_HASHES
        for i, (part, number) in enumerate(zip(parts.tolist(), (numbers - skipped).tolist(), strict=True)):
            raw = os.pread(self._files[part].fileno(), 4 * NUM_HASHES, number * ENTRY.itemsize + head)
            found[i] = np.frombuffer(raw, dtype="<u4")
        return found[inverse]

    def close(self) -> None:
        """Closes its files."""
        for file in self._files:
            file.close()
