"""Training records that hold a held-out prompt or answer are found by the runs of words that they share.

G runs of a batch, U held-out texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_dist.data.words import WordHashes

RUN_WORDS = 13
"""As in the GPT-3 paper (Brown et al. 2020, appendix C)."""

MAX_RUNS = 2**22
LEAST_KEPT = 32
MAX_OWNERS = 10
"""A run in more held-out texts than this is boilerplate, and tells nothing (the GPT-3 paper has 10, too)."""

FLOOR = 0.25
"""Less than this share of a held-out text is no match."""


@dataclass(frozen=True, slots=True)
class Match:
    """The held-out text that another text holds most of: the share of its runs there, and the two's Jaccard index."""

    held_out: str
    contained: float
    jaccard: float


class HeldOutRuns:
    """The runs of words of all held-out prompts and answers, about `MAX_RUNS` in memory.

    Where there are more, each text keeps as many of its own as there is room for, those with the smallest hashes (a
    bottom-k sketch, Cohen and Kaplan 2007): short texts are still compared whole, shares of long ones are estimates.
    """

    def __init__(self, run_words: int = RUN_WORDS, max_runs: int = MAX_RUNS) -> None:
        self.run_words, self._max = run_words, max_runs
        self._runs: list[np.ndarray] = []
        self._owners: list[str] = []
        self._sizes = array("q")
        self._num, self._kept = 0, 2**12

    def add(self, owner: str, texts: Sequence[str]) -> None:
        """Adds texts of a held-out record; those shorter than a run are left to exact matching."""
        runs, text = WordHashes(texts).runs(self.run_words)
        for number in range(len(texts)):
            own = np.unique(runs[text == number])
            if len(own):
                self._runs.append(own[: self._kept].copy())
                self._owners.append(owner)
                self._sizes.append(len(own))
                self._num += len(self._runs[-1])
        while self._num > self._max and self._kept > LEAST_KEPT:
            self._kept //= 2
            self._runs = [own[: self._kept].copy() for own in self._runs]
            self._num = sum(map(len, self._runs))

    def finish(self) -> None:
        """Sorts what was added; then `matches` may be asked."""
        self._size_U = np.array([len(own) for own in self._runs], dtype=np.int64)
        runs = np.concatenate([np.zeros(0, dtype=np.uint64), *self._runs])
        order = np.argsort(runs, kind="stable")
        runs, units = runs[order], np.repeat(np.arange(len(self._size_U)), self._size_U)[order]
        _, inverse, counts = np.unique(runs, return_inverse=True, return_counts=True)
        is_telling = counts[inverse] <= MAX_OWNERS
        self._runs, self._sorted, self._units = [], runs[is_telling], units[is_telling]
        self._filter = np.zeros(max(2**10, 1 << (8 * len(runs)).bit_length()), dtype=bool)
        self._filter[self._address(self._sorted)] = True

    def matches(self, records: Sequence[Sequence[str]]) -> list[Match | None]:
        """Returns for each record's texts the held-out text that they hold most of; None below `FLOOR`."""
        owner_N = np.repeat(np.arange(len(records)), [len(texts) for texts in records])
        run_G, text_G = WordHashes([text for texts in records for text in texts]).runs(self.run_words)
        owner_G = owner_N[text_G]
        maybe = np.flatnonzero(self._filter[self._address(run_G)])
        record, unit, shared = self._shared(owner_G[maybe], run_G[maybe])
        contained = shared / self._size_U[unit] if len(unit) else np.zeros(0)
        found: list[Match | None] = [None] * len(records)
        for i in np.lexsort((-unit, contained)):
            if contained[i] >= FLOOR:
                size, held_out_size = len(np.unique(run_G[owner_G == record[i]])), self._sizes[int(unit[i])]
                both = contained[i] * held_out_size
                jaccard = min(1.0, float(both / max(1, held_out_size + size - both)))
                found[int(record[i])] = Match(self._owners[int(unit[i])], float(contained[i]), jaccard)
        return found

    def _shared(self, owner_G: np.ndarray, run_G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns triples (record, held-out text, number of distinct runs in both)."""
        low, high = np.searchsorted(self._sorted, run_G), np.searchsorted(self._sorted, run_G, side="right")
        order = np.lexsort((run_G, owner_G))
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = (np.diff(owner_G[order]) != 0) | (run_G[order][1:] != run_G[order][:-1])
        owner, low, num = owner_G[order][is_new], low[order][is_new], (high - low)[order][is_new]
        at = np.repeat(low - (np.cumsum(num) - num), num) + np.arange(num.sum())
        key = np.repeat(owner, num) * max(1, len(self._size_U)) + self._units[at]
        pairs, shared = np.unique(key, return_counts=True)
        return pairs // max(1, len(self._size_U)), pairs % max(1, len(self._size_U)), shared

    def _address(self, runs: np.ndarray) -> np.ndarray:
        """Returns a run's place in the filter, which tells most runs that are not held out without a search."""
        return (runs & np.uint64(len(self._filter) - 1)).astype(np.int64)
