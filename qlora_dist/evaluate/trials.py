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
    field = _Field(ended, allowed, best, found, over, _corrected(over), max_forgetting)
    chosen = field.smallest_alike()
    rows = [field.row(t) | _own_interval(documents[t.name], domain) for t in ended]
    return {"winner": chosen.name, "best": best.name, "reason": field.reason(chosen), "trials": rows}


@dataclass(frozen=True, slots=True)
class _Field:
    """All trials that came to the end, and how each one compares with the best."""

    ended: Sequence[TrialConfig]
    allowed: Sequence[TrialConfig]
    best: TrialConfig
    found: Mapping[str, Measured]
    over: Mapping[str, Estimate]
    corrected: Mapping[str, float]
    max_forgetting: float

    def smallest_alike(self) -> TrialConfig:
        """Returns the smallest of those that can't be told from the best, which is one of them."""
        alike = [t for t in self.allowed if self.corrected.get(t.name, 0.0) >= LEVEL]
        return min([self.best, *alike], key=lambda t: (*size(t), self.found[t.name].bits_per_byte))

    def row(self, trial: TrialConfig) -> dict[str, Any]:
        """Returns what is shown of one trial."""
        found, over = self.found[trial.name], self.over.get(trial.name)
        return {
            "trial": trial.name,
            "validation_bits_per_byte": finite(found.bits_per_byte),
            "low": None,
            "high": None,
            "forgetting": finite(found.forgetting),
            "forgets_too_much": found.forgetting > self.max_forgetting,
            "over_best": finite(over.value) if over else 0.0,
            "over_best_low": over.low if over else None,
            "over_best_high": over.high if over else None,
            "p_holm": self.corrected.get(trial.name),
        }

    def reason(self, chosen: TrialConfig) -> str:
        """Says in words who is chosen and why."""
        best, limit = self.best, f"{self.max_forgetting:g}"
        if not self.allowed:
            who = f"All {len(self.ended)} trials forget" if len(self.ended) > 1 else "The only trial at its end forgets"
            least = "; it the least" if len(self.ended) > 1 else ""
            return f"{who} more than {limit} bits per byte of general text{least}."
        if len(self.ended) == 1:
            return f"{best.name} is the only one that came to its end, and forgets at most {limit} bits per byte."
        if len(self.allowed) == 1:
            return f"{best.name} is the only one of {len(self.ended)} that forgets at most {limit} bits per byte."
        words = f"{best.name} has the fewest bits per byte of {len(self.allowed)} trials that forget at most {limit}; "
        if self.over and not self.corrected:
            return words + "there are too few documents to say how sure that is."
        cheapest = min(self.ended, key=lambda t: (*size(t), self.found[t.name].bits_per_byte))
        return words + self._beside_cheapest(cheapest, chosen)

    def _beside_cheapest(self, cheapest: TrialConfig, chosen: TrialConfig) -> str:
        if size(self.best) == size(cheapest):
            return "none is smaller."
        if cheapest in self.allowed and self.corrected.get(cheapest.name, 0.0) >= LEVEL:
            cheap = f"it is not distinguishable from the cheapest, {self._told(cheapest)}"
            if chosen is cheapest:
                return f"{cheap}, which is preferred."
        else:
            cheap = f"the cheapest is worse, {self._told(cheapest)}"
            if cheapest not in self.allowed:
                cheap = f"the cheapest, {cheapest.name}, forgets too much"
        if chosen is self.best:
            return f"{cheap}, and so is each smaller one."
        return f"{cheap}; of those not distinguishable from it the smallest is preferred, {self._told(chosen)}."

    def _told(self, trial: TrialConfig) -> str:
        over = self.over[trial.name]
        interval = "" if over.low is None or over.high is None else f", {over.low:+.4f} to {over.high:+.4f}"
        return f"{trial.name} ({over.value:+.4f} bits per byte{interval})"


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


def _own_interval(documents: Sequence[Document], domain: str) -> dict[str, Any]:
    own = estimate([d for d in documents if d.domain == domain], METRIC)
    return {"low": own.low, "high": own.high} if own else {}


def finite(value: float) -> float | None:
    """Returns a number as JSON can hold it: None for what isn't finite."""
    return value if math.isfinite(value) else None
