"""Texts as sequences of word hashes: what near-duplicates and contamination are told by."""

from __future__ import annotations

import re
from zlib import crc32

import numpy as np

SEPARATORS = bytes(c for c in range(128) if not chr(c).isalnum())
TO_WORDS = bytes.maketrans(SEPARATORS + bytes(range(65, 91)), b" " * len(SEPARATORS) + bytes(range(97, 123)))
"""Lowers ASCII letters and turns ASCII punctuation into spaces; other bytes of UTF-8 count as letters."""

UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
"""Scripts that don't put spaces between words: there, each letter counts as a word."""

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(text: str) -> np.ndarray:
    """Returns a 64-bit hash of each word, in order; case, spaces and punctuation make no difference."""
    if not text.isascii():
        text = UNSPACED.sub(r" \1 ", text.casefold())
    words = text.encode("utf-8", "surrogatepass").translate(TO_WORDS).split()
    return mix(np.fromiter(map(crc32, words), dtype=np.uint64, count=len(words)))


def gram_hashes(words: np.ndarray, size: int) -> np.ndarray:
    """Returns a hash of each run of `size` words; a shorter text is one run of its own."""
    size = max(1, min(size, len(words)))
    total = np.zeros(max(0, len(words) - size + 1), dtype=np.uint64)
    for i in range(size):
        total = total * MULTIPLIER + words[i : len(words) - size + 1 + i]
    return mix(total)


def mix(values: np.ndarray) -> np.ndarray:
    """Scatters 64-bit integers evenly (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = values + MULTIPLIER
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def place(identity: int, purpose: str) -> float:
    """Returns a number in [0, 1) that depends on an id and a purpose alone: how chance is dealt, here."""
    return float(places(np.array([identity], dtype=np.uint64), purpose)[0])


def places(identities: np.ndarray, purpose: str) -> np.ndarray:
    """Returns `place` of each id [N]."""
    return (mix(mix(identities) ^ np.uint64(crc32(purpose.encode()))) >> np.uint64(11)) * 2.0**-53
