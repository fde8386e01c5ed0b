"""Training records that hold a held-out prompt or answer are found by the word sequences they share.

G word sequences (grams), U held-out texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_dist.data.words import gram_hashes, word_hashes

GRAM_WORDS = 13
"""As in the GPT-3 paper (Brown et al. 2020, appendix C)."""

MAX_GRAMS = 2**22
FILTER_BITS = 2**28


@dataclass(frozen=True, slots=True)
class Match:
    """How much a text shares with the held-out text that it shares most with: of that one's grams, and of both's."""

    held_out: str
    contained: float
    jaccard: float


class HeldOutGrams:
    """The grams of all held-out prompts and answers, at most `MAX_GRAMS` in memory.

    Of more, every k-th by hash is kept, on both sides: the shares stay unbiased (FracMinHash, Irber et al. 2022).
    """

    def __init__(self, gram_words: int = GRAM_WORDS, max_grams: int = MAX_GRAMS) -> None:
        self.gram_words, self._max = gram_words, max_grams
        self._grams: list[np.ndarray] = []
        self._owners: list[str] = []
        self._num, self._keep_below = 0, np.uint64(2**64 - 1)

    def add(self, record_id: str, texts: Iterable[str]) -> None:
        """Adds the texts of a held-out record; those shorter than a gram are left to exact matching."""
        for part in texts:
            words = word_hashes(part)
            if len(words) >= self.gram_words:
                kept = self._sampled(gram_hashes(words, self.gram_words))
                self._grams.append(kept)
                self._owners.append(record_id)
                self._num += len(kept)
        while self._num > self._max:
            self._keep_below //= np.uint64(2)
            self._grams = [grams[grams <= self._keep_below] for grams in self._grams]
            self._num = sum(map(len, self._grams))

    def finish(self) -> None:
        """Sorts what was added; then `matches` may be asked."""
        self._sizes = np.array([len(grams) for grams in self._grams], dtype=np.int64)
        grams = np.concatenate([np.zeros(0, dtype=np.uint64), *self._grams])
        units = np.repeat(np.arange(len(self._sizes)), self._sizes)
        order = np.argsort(grams, kind="stable")
        self._sorted, self._units = grams[order], units[order]
        self._grams = []
        self._filter = np.zeros(FILTER_BITS // 8 if len(grams) > 2**16 else 2**20, dtype=np.uint8)
        byte, bit = self._address(self._sorted)
        np.bitwise_or.at(self._filter, byte, bit)

    def matches(self, records: Sequence[Iterable[str]]) -> list[Match | None]:
        """Returns for each record's texts the held-out text that they hold most of; None where no gram is shared."""
        pieces = [self._grams_of(texts) for texts in records]
        owner = np.repeat(np.arange(len(pieces)), [len(grams) for grams in pieces])
        grams = np.concatenate([np.zeros(0, dtype=np.uint64), *pieces])
        byte, bit = self._address(grams)
        maybe = (self._filter[byte] & bit) != 0
        owner, grams = owner[maybe], grams[maybe]
        low, high = np.searchsorted(self._sorted, grams), np.searchsorted(self._sorted, grams, side="right")
        owner, low, high = owner[high > low], low[high > low], high[high > low]
        found: list[Match | None] = [None] * len(pieces)
        for i in np.unique(owner):
            at = owner == i
            units = np.concatenate([self._units[a:b] for a, b in zip(low[at], high[at], strict=True)])
            found[int(i)] = self._best(units, len(pieces[int(i)]))
        return found

    def _best(self, units: np.ndarray, size: int) -> Match:
        unit, shared = np.unique(units, return_counts=True)
        contained = shared / self._sizes[unit]
        best = int(np.argmax(contained))
        jaccard = float((shared / (self._sizes[unit] + size - shared)).max())
        return Match(self._owners[int(unit[best])], float(contained[best]), jaccard)

    def _grams_of(self, texts: Iterable[str]) -> np.ndarray:
        found = [word_hashes(part) for part in texts]
        grams = [gram_hashes(words, self.gram_words) for words in found if len(words) >= self.gram_words]
        return self._sampled(np.concatenate([np.zeros(0, dtype=np.uint64), *grams]))

    def _sampled(self, grams: np.ndarray) -> np.ndarray:
        return np.unique(grams[grams <= self._keep_below])

    def _address(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = grams % np.uint64(8 * len(self._filter))
        return (place >> np.uint64(3)).astype(np.int64), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)
