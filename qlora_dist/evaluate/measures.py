"""Pure measures of one answer against its reference: what was said, in which form, and whether it wandered off."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from qlora_dist.evaluate.terms import WORD, found_terms

ARTICLES = re.compile(r"\b(a|an|the)\b")
MIN_SUPPORTED_CHARS = 4
"""Shorter words (articles, prepositions) are in any context, and so say nothing of faithfulness."""


def normalized(text: str) -> str:
    """Returns lower-case text without ASCII punctuation, English articles and extra blanks (as SQuAD's script does)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """Returns 1 when both say the same after `normalized`, else 0 (Rajpurkar et al., arXiv 1606.05250)."""
    return float(normalized(answer) == normalized(reference))


def token_f1(answer: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall over words, as a bag (arXiv 1606.05250, section 6.1)."""
    ours, theirs = normalized(answer).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def rouge_l(answer: str, reference: str) -> float | None:
    """Returns the F-measure of the longest common subsequence (Lin, 2004); None if `rouge_score` isn't installed."""
    scorer = _rouge()
    return None if scorer is None else float(scorer.score(reference, answer)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    return RougeScorer(["rougeL"], use_stemmer=False)


def repetition(answer: str, size: int = 4) -> float:
    """Returns the share of word n-grams that stood there before: 0 for plain prose, near 1 for a loop."""
    words = answer.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def support(answer: str, context: str) -> float | None:
    """Returns the share of the answer's longer words that the context holds; None where it has none.

    A word overlap, not an entailment: it catches invented names and numbers, not wrong use of right words.
    """
    said = [w for w in WORD.findall(answer.lower()) if len(w) >= MIN_SUPPORTED_CHARS or w.isdigit()]
    if not said:
        return None
    known = set(WORD.findall(context.lower()))
    return sum(w in known for w in said) / len(said)


def term_recall(answer: str, reference: str, terms: Collection[str]) -> float | None:
    """Returns the share of the reference's domain terms that the answer uses; None where it has none."""
    wanted = found_terms(reference, terms)
    return len(wanted & found_terms(answer, terms)) / len(wanted) if wanted else None


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Returns the mean over the references' classes of each class's F1; an unknown answer is of no class."""
    ours, theirs = [normalized(a) for a in answers], [normalized(r) for r in references]
    scores = []
    for name in sorted(set(theirs)):
        hits = sum(a == r == name for a, r in zip(ours, theirs, strict=True))
        scores.append(2 * hits / (ours.count(name) + theirs.count(name)))
    return sum(scores) / len(scores) if scores else 0.0


def read_json(text: str) -> tuple[Any, str]:
    """Returns (the JSON value, "") or (None, the kind of failure): empty, text around JSON, cut off, not JSON."""
    if not text.strip():
        return None, "empty"
    try:
        return json.loads(text), ""
    except ValueError:
        pass
    start = min((i for i in (text.find("{"), text.find("[")) if i >= 0), default=-1)
    if start < 0:
        return None, "not JSON"
    try:
        json.JSONDecoder().raw_decode(text[start:])
    except ValueError as error:
        cut = getattr(error, "pos", 0) >= len(text[start:].rstrip()) - 1 or text.count("{") > text.count("}")
        return None, "cut off" if cut else "not JSON"
    return None, "text around JSON"
