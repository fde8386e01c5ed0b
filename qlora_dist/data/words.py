"""Texts as runs of word hashes: what copies and contamination are told by. Whole batches at a time.

N texts, W words of all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from zlib import crc32

import numpy as np

SEPARATORS = bytes(c for c in range(128) if not chr(c).isalnum())
TO_WORDS = bytes.maketrans(SEPARATORS + bytes(range(65, 91)), b" " * len(SEPARATORS) + bytes(range(97, 123)))
"""Lowers ASCII letters and turns ASCII punctuation into spaces; other bytes of UTF-8 count as letters."""

UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
"""Scripts that don't put spaces between words: there, each letter counts as a word."""

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class WordHashes:
    """The words of some texts as 64-bit integers, and where each text's begin: case and punctuation set aside."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = [_words(text) for text in texts]
        self.num_N = np.array([len(w) for w in words], dtype=np.int64)
        self.start_N = np.cumsum(self.num_N) - self.num_N
        total = int(self.num_N.sum())
        self.words_W = np.fromiter(map(crc32, chain.from_iterable(words)), dtype=np.uint64, count=total)

    def runs(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a hash of each run of `size` words within a text, and the number of its text; in order."""
        num_runs = max(0, len(self.words_W) - size + 1)
        hashes = np.zeros(num_runs, dtype=np.uint64)
        for i in range(size):
            hashes *= MULTIPLIER
            hashes += self.words_W[i : num_runs + i]
        text_W = np.repeat(np.arange(len(self.num_N)), self.num_N)[:num_runs]
        is_whole = np.arange(num_runs) + size <= (self.start_N + self.num_N)[text_W]
        return mix(hashes[is_whole]), text_W[is_whole]

    def wholes(self) -> np.ndarray:
        """Returns one hash of all words of each text [N]: a polynomial with scattered coefficients."""
        place_W = np.arange(1, len(self.words_W) + 1) - np.repeat(self.start_N, self.num_N)
        terms_W = self.words_W * (mix(place_W.astype(np.uint64)) | np.uint64(1))
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms_W, dtype=np.uint64)])
        return mix((sums[self.start_N + self.num_N] - sums[self.start_N]) ^ self.num_N.astype(np.uint64))


def mix(values: np.ndarray) -> np.ndarray:
    """Scatters 64-bit integers evenly (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = values + MULTIPLIER
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def place(identity: int, purpose: str) -> float:
    """Returns a number in [0, 1) that depends on an id and a purpose alone: how chance is dealt, here."""
    return float(places(np.array([identity], dtype=np.uint64), purpose)[0])


def places(identities: np.ndarray, purpose: str) -> np.ndarray:
    """Returns `place` of each id [N]."""
    scattered = mix(mix(identities) ^ np.uint64(crc32(purpose.encode())))
    return np.asarray((scattered >> np.uint64(11)) * 2.0**-53)


def _words(text: str) -> list[bytes]:
    if not text.isascii():
        text = UNSPACED.sub(r" \1 ", text.casefold())
    return text.encode("utf-8", "surrogatepass").translate(TO_WORDS).split()
