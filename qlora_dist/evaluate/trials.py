"""Which trial of a sweep is chosen, and how sure that is: by development data, paired by document.

The best is the one with the fewest bits per byte among those that forget little enough. Each other one is compared
with it on the same documents, corrected for how many are compared. Of those that can't be told from the best, the
smallest is chosen: an adapter of a lower rank costs less, and nothing is known to be lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_dist.config.sweep import TrialConfig
from qlora_dist.errors import DataError
from qlora_dist.evaluate.documents import Document, estimate
from qlora_dist.evaluate.statistics import Estimate, estimate_ratio, holm

GENERAL = "general"
LEVEL = 0.05
METRIC = "bits_per_byte"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model came to on development data: bits per byte of its domain, and those it forgot of general text."""

    bits_per_byte: float
    forgetting: float

    @classmethod
    def of(cls, documents: Sequence[Document], base: Sequence[Document], domain: str) -> Measured:
        """Measures one model against the base, both on the same documents; a loss that is no number reads inf.

        Raises:
            DataError: if the two were scored on different documents.
        """
        if [(d.domain, d.record) for d in documents] != [(d.domain, d.record) for d in base]:
            raise DataError("A trial and the base were scored on different documents: score both again.")
        forgotten = bits_per_byte(documents, GENERAL) - bits_per_byte(base, GENERAL)
        found = cls(bits_per_byte(documents, domain), forgotten)
        return found if math.isfinite(found.bits_per_byte + found.forgetting) else cls(math.inf, math.inf)


def bits_per_byte(documents: Sequence[Document], domain: str) -> float:
    """Returns the bits per byte of a domain's documents.

    Raises:
        DataError: if there is none.
    """
    bits = sum(d.nll_bits for d in documents if d.domain == domain)
    size = sum(d.bytes for d in documents if d.domain == domain)
    if not size:
        repair = f"Raise domain.{domain}.split.validation_share" if domain != GENERAL else "Raise general.split"
        raise DataError(f"A sweep is judged by development data, and {domain} has none. {repair}.")
    return bits / size


def choose_among(
    trials: Sequence[TrialConfig],
    documents: Mapping[str, Sequence[Document]],
    base: Sequence[Document],
    domain: str,
    max_forgetting: float,
) -> dict[str, Any]:
    """Returns who is chosen and why, and a row for each trial that was trained to the end.

    Args:
        trials: the trials, in the order of the sweep.
        documents: the development documents of each trial that was trained to the end, by its name.
        base: those of the base.
        domain: the domain that the trials were trained for; `general` is what forgetting is judged by.
        max_forgetting: in bits per byte of general text.

    Raises:
        DataError: if no trial was trained to the end, or documents differ.
    """
    ended = [trial for trial in trials if trial.name in documents]
    if not ended:
        raise DataError("No trial of the sweep came to its end. Lower the learning rates.")
    found = {t.name: Measured.of(documents[t.name], base, domain) for t in ended}
    allowed = [t for t in ended if found[t.name].forgetting <= max_forgetting]
    best = min(allowed or ended, key=lambda t: _order(found[t.name], bool(allowed)))
    over = {t.name: _difference(documents[t.name], documents[best.name], domain) for t in ended if t is not best}
    corrected = _corrected(over)
    alike = [t for t in allowed if t is best or corrected.get(t.name, 0.0) >= LEVEL]
    chosen = min(alike, key=lambda t: (*size(t), found[t.name].bits_per_byte)) if alike else best
    rows = [
        _row(t, found[t.name], documents[t.name], over.get(t.name), corrected.get(t.name), domain, max_forgetting)
        for t in ended
    ]
    reason = _reason(best, chosen, min(ended, key=size), ended, allowed, corrected, over, max_forgetting)
    return {"winner": chosen.name, "best": best.name, "reason": reason, "trials": rows}


def size(trial: TrialConfig) -> tuple[int, int]:
    """Returns what makes an adapter cost: its rank, then how many kinds of layers it is on (none named: all)."""
    return trial.lora.lora_rank, len(trial.lora.target_modules) or 1000


def _order(found: Measured, is_allowed: bool) -> float:
    return found.bits_per_byte if is_allowed else found.forgetting


def _difference(theirs: Sequence[Document], best: Sequence[Document], domain: str) -> Estimate:
    pairs = [(t, b) for t, b in zip(theirs, best, strict=True) if b.domain == domain]
    tops = np.array([t.nll_bits - b.nll_bits for t, b in pairs], dtype=np.float64)
    if not np.isfinite(tops).all():
        return Estimate(math.inf)
    sizes = np.array([b.bytes for _, b in pairs], dtype=np.float64)
    return estimate_ratio(tops, sizes, np.array([b.cluster for _, b in pairs]))


def _corrected(over: Mapping[str, Estimate]) -> dict[str, float]:
    tested = {name: e.p_value for name, e in over.items() if e.p_value is not None}
    return dict(zip(tested, holm(list(tested.values())), strict=True))


def _row(
    trial: TrialConfig,
    found: Measured,
    documents: Sequence[Document],
    over: Estimate | None,
    p_holm: float | None,
    domain: str,
    max_forgetting: float,
) -> dict[str, Any]:
    own = estimate([d for d in documents if d.domain == domain], METRIC)
    row: dict[str, Any] = {"trial": trial.name, "validation_bits_per_byte": finite(found.bits_per_byte)}
    row |= {"low": own.low if own else None, "high": own.high if own else None}
    row |= {"forgetting": finite(found.forgetting), "forgets_too_much": found.forgetting > max_forgetting}
    row["over_best"] = finite(over.value) if over else 0.0
    row |= {"over_best_low": over.low if over else None, "over_best_high": over.high if over else None}
    return row | {"p_holm": p_holm}


def finite(value: float) -> float | None:
    """Returns a number as JSON can hold it: None for what isn't finite."""
    return value if math.isfinite(value) else None


def _reason(
    best: TrialConfig,
    chosen: TrialConfig,
    cheapest: TrialConfig,
    ended: Sequence[TrialConfig],
    allowed: Sequence[TrialConfig],
    corrected: Mapping[str, float],
    over: Mapping[str, Estimate],
    max_forgetting: float,
) -> str:
    """Says in words who is chosen and why."""
    if not allowed:
        least = f"all {len(ended)} trials forget more than {max_forgetting:g} bits per byte of general text"
        return f"{chosen.name}: {least}; this one the least."
    words = [f"{best.name} has the fewest bits per byte of {len(allowed)} trials that forget at most {max_forgetting:g}"]
    if over and not corrected:
        return f"{words[0]}; there are too few documents to say how sure that is."
    if size(best) == size(cheapest):
        words.append("none is smaller")
    elif corrected.get(cheapest.name, 0.0) >= LEVEL and cheapest in allowed:
        words.append(f"it is not distinguishable from the cheapest, {cheapest.name} ({_told(over[cheapest.name])})")
    elif cheapest.name in over:
        words.append(f"it is better than the cheapest, {cheapest.name} ({_told(over[cheapest.name])})")
    if chosen is not best:
        words.append(f"so the smaller is preferred: {chosen.name}" if chosen is cheapest else _smaller(chosen, over))
    return "; ".join(words) + "."


def _smaller(chosen: TrialConfig, over: Mapping[str, Estimate]) -> str:
    return f"of those not distinguishable from it the smallest is preferred: {chosen.name} ({_told(over[chosen.name])})"


def _told(difference: Estimate) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.4f} bits per byte"
    return f"{difference.value:+.4f} bits per byte, {difference.low:+.4f} to {difference.high:+.4f}"
