"""A domain's own terms: found in its training text by one rule, and marked among a model's targets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlora_dist.config.stages import ScoresConfig
from qlora_dist.data.encode import Encoder
from qlora_dist.data.record import read_records

WORD = re.compile(r"\w+", re.UNICODE)
SPLITS_PREFIX = "splits-"
GENERAL = "general"
NUM_RECORDS = 2000
"""Training records that the rule reads."""


def domain_terms(domain: Sequence[str], general: Sequence[str], limit: int = 300) -> frozenset[str]:
    """Returns the words that are a domain's own, by one rule.

    A term has at least four letters and stands at least three times in the domain's training text, and at least four
    times as often there as in general text (counts smoothed by one); the `limit` most frequent of these are kept.
    """
    ours, theirs = _count(domain), _count(general)
    num_ours, num_theirs = sum(ours.values()) or 1, sum(theirs.values()) or 1
    own = [
        (count, word)
        for word, count in ours.items()
        if count >= 3 and count / num_ours >= 4 * (theirs[word] + 1) / (num_theirs + 1)
    ]
    return frozenset(word for _, word in sorted(own, key=lambda t: (-t[0], t[1]))[:limit])


def _count(texts: Sequence[str]) -> Counter[str]:
    return Counter(w for text in texts for w in WORD.findall(text.lower()) if len(w) >= 4 and w.isalpha())


def terms_of(domain: str, config: ScoresConfig, inputs: Mapping[str, Path]) -> frozenset[str]:
    """Returns a domain's terms: those of its config, else those that the rule finds in its splits.

    There are none for `general`, nor without splits among a stage's inputs.
    """
    if listed := config.terms.get(domain):
        return frozenset(" ".join(term.lower().split()) for term in listed)
    if domain == GENERAL or f"{SPLITS_PREFIX}{domain}" not in inputs:
        return frozenset()
    return domain_terms(_texts(inputs, domain), _texts(inputs, GENERAL))


def _texts(inputs: Mapping[str, Path], domain: str) -> list[str]:
    folder = inputs.get(f"{SPLITS_PREFIX}{domain}")
    return [r.whole() for r in islice(read_records(folder / "train.jsonl"), NUM_RECORDS)] if folder else []


def found_terms(text: str, terms: Collection[str]) -> set[str]:
    """Returns the terms, of one word or of several, that stand in a text."""
    if not terms:
        return set()
    return {" ".join(match[0].split()) for match in _pattern(frozenset(terms)).finditer(text.lower())}


@cache
def _pattern(terms: frozenset[str]) -> re.Pattern[str]:
    """Returns what finds whole terms, the longest at each place."""
    ordered = sorted(terms, key=lambda term: (-len(term), term))
    written = (r"\s+".join(map(re.escape, term.split())) for term in ordered)
    return re.compile(r"(?<!\w)(?:" + "|".join(written) + r")(?!\w)")


class TermMarker:
    """Marks the tokens of a segment that spell a term, from the tokens alone."""

    def __init__(self, tokenizer: Path, terms: Collection[str]) -> None:
        self._tokenizer = Encoder(tokenizer).tokenizer
        self._pattern = _pattern(frozenset(terms))
        self._pieces: dict[int, str] = {}

    def mark(self, tokens_T: NDArray[np.int64], trained_T: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], int]:
        """Returns which targets spell a term, and how many terms all of whose tokens are targets there are."""
        pieces = [self._piece(int(token)) for token in tokens_T]
        ends = np.cumsum([len(piece) for piece in pieces])
        marked_T, num_terms = np.zeros(len(pieces), dtype=bool), 0
        for term in self._pattern.finditer(_lower("".join(pieces))):
            first, last = np.searchsorted(ends, [term.start(), term.end() - 1], side="right")
            if trained_T[first : last + 1].all():
                marked_T[first : last + 1] = True
                num_terms += 1
        return marked_T, num_terms

    def _piece(self, token: int) -> str:
        """Returns a token as text; the marks by which tokenizers write a blank before a word become blanks."""
        if token not in self._pieces:
            raw = self._tokenizer.id_to_token(token) or ""
            self._pieces[token] = raw.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
        return self._pieces[token]


def _lower(text: str) -> str:
    """Returns lower case of the same length: places must stay (the Turkish dotted I has a longer one)."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c if len(c.lower()) != 1 else c.lower() for c in text)
