"""Each record has an index entry: its id, a hash of its words, and a MinHash signature of its 5-word runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_dist.config.data import Use
from qlora_dist.data.record import Record
from qlora_dist.data.words import WordHashes, mix

NUM_HASHES = 128
RUN_WORDS = 5
SEED = 20_481
INDEX = "index.bin"
CHUNK = 2**15
HEAD = np.dtype([("id", "<u8"), ("words", "<u8"), ("context", "<u8"), ("use", "u1")])
ENTRY = np.dtype([*HEAD.descr, ("signature", "<u4", (NUM_HASHES,))])
"""One entry of `index.bin`; entry i belongs to line i of `records.jsonl`. `use` is the number of a `Use`."""

USES = [use.value for use in Use]


def index_entries(records: Sequence[Record]) -> np.ndarray:
    """Returns the entries of these records (MinHash: Broder 1997; signatures by rensa).

    Signatures are of what a record says of its own: a context that several questions are about makes no copies of
    them, but records on different contexts are never near. A text shorter than a run is one run; one without words
    (nothing but punctuation) is known by its id.
    """
    from rensa import RMinHash

    entries = np.zeros(len(records), dtype=ENTRY)
    entries["id"] = [int(record.id, 16) for record in records]
    entries["use"] = [USES.index(record.use) if record.use else 0 for record in records]
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """`num` entries of one part, from its entry `start` on; the first has number `first` among those of all parts."""

    path: Path
    start: int
    num: int
    first: int

    def entries(self) -> np.ndarray:
        """Reads its entries, [num]."""
        return np.fromfile(self.path, ENTRY, self.num, offset=self.start * ENTRY.itemsize)


class Index:
    """The entries of all parts of a domain, in order; they stay on disk."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._paths = [folder / INDEX for folder in folders]
        lengths = [path.stat().st_size // ENTRY.itemsize for path in self._paths]
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def chunks(self) -> list[Chunk]:
        """Divides the entries into chunks that fit in memory, in order."""
        found: list[Chunk] = []
        for path, start, end in zip(self._paths, [0, *self._ends.tolist()], self._ends.tolist(), strict=False):
            found += [Chunk(path, at - start, min(CHUNK, end - at), at) for at in range(start, end, CHUNK)]
        return found

    def signatures(self, records: np.ndarray) -> np.ndarray:
        """Reads the signatures of these records [N] into an array [N, NUM_HASHES]."""
        numbers, inverse = np.unique(records, return_inverse=True)
        found = np.zeros((len(numbers), NUM_HASHES), dtype=np.uint32)
        parts = np.searchsorted(self._ends, numbers, side="right")
        skipped = np.append(0, self._ends)[parts]
        for part in np.unique(parts).tolist():
            with self._paths[part].open("rb") as file:
                handle = file.fileno()
                for i in np.flatnonzero(parts == part).tolist():
                    at = int(numbers[i] - skipped[i]) * ENTRY.itemsize + HEAD.itemsize
                    found[i] = np.frombuffer(os.pread(handle, 4 * NUM_HASHES, at), dtype="<u4")
        return found[inverse]
