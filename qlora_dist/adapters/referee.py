"""The referee: which of several merges is shipped, by development data alone.

Scores come as rows, one a candidate and document:
`{"candidate", "domain", "document", "nll", "bytes", "tokens"}`, nll in nats, and `"cluster"` where documents have
near-copies. Candidate `base` is the model without an adapter; domain `general` is what forgetting is judged by.
*Gain* is the mean over the other domains of how many bits per byte a candidate is better than the base, *forgetting*
how many it is worse on `general`. The sealed test set is no business of this module: it is read once, for the winner.

Letters: D documents of a domain, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dist.config.merge import MergeConfig, MergeMethod
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts

BASE, GENERAL = "base", "general"
SCALES = (1.0, 1.25, 1.5, 1.75, 2.0)
"""λ: the mean of adapters of different domains moves the base too little."""
NUM_RESAMPLES = 2000


def candidates(
    merge: MergeConfig, methods: Sequence[MergeMethod], scales: Sequence[float] = SCALES
) -> dict[str, MergeConfig]:
    """Returns every merge that the referee compares, by name: `concat x1.5`. Singles and the base come on top."""
    return {f"{m.name} x{scale:g}": replace(merge, method=m, scale=scale) for m in methods for scale in scales}


@dataclass(frozen=True, slots=True)
class Standing:
    """One candidate's place: bits per byte won on the domains, and lost on general text."""

    candidate: str
    gain: float
    forgetting: float
    gain_by_domain: dict[str, float]
    on_front: bool = False


def judge(rows: Iterable[Mapping[str, Any]], *, forgetting_at_most: float, seed: int = 0) -> Facts:
    """Returns the candidates' standings, the Pareto front of gain and forgetting, and who is shipped and why.

    Args:
        rows: the scores on development data, as the module says.
        forgetting_at_most: in bits per byte on general text, for the shipped one.
        seed: of the bootstrap.

    Raises:
        DataError: if two candidates weren't scored on the same documents.
    """
    scores = _Scores.of(rows)
    standings = pareto_front([scores.standing(name) for name in scores.candidates if name != BASE])
    chosen, reason = choose(standings, forgetting_at_most)
    rivals = [s.candidate for s in standings if s.candidate != chosen]
    return {
        "standings": [_plain(s) for s in sorted(standings, key=lambda s: -s.gain)],
        "front": [s.candidate for s in standings if s.on_front],
        "chosen": chosen,
        "reason": reason,
        "gain": scores.gain_interval(chosen, BASE, seed),
        "forgetting": scores.forgetting_interval(chosen, seed),
        "over": {rival: scores.gain_interval(chosen, rival, seed) for rival in rivals},
    }


def pareto_front(standings: Sequence[Standing]) -> list[Standing]:
    """Returns the same standings with those marked that no other beats in both gain and forgetting."""

    def is_beaten(one: Standing) -> bool:
        return any(
            s.gain >= one.gain
            and s.forgetting <= one.forgetting
            and (s.gain, s.forgetting) != (one.gain, one.forgetting)
            for s in standings
        )

    return [replace(s, on_front=not is_beaten(s)) for s in standings]


def choose(standings: Sequence[Standing], forgetting_at_most: float) -> tuple[str, str]:
    """Returns the candidate with the most gain among those that forget little enough, and the reason in words."""
    allowed = [s for s in standings if s.forgetting <= forgetting_at_most]
    if allowed:
        best = max(allowed, key=lambda s: s.gain)
        reason = f"most gain of {len(allowed)} that forget at most {forgetting_at_most:g} bits per byte"
        return best.candidate, reason if best.gain > 0 else f"{reason}, and that is none: the base alone does as well"
    best = min(standings, key=lambda s: s.forgetting)
    return best.candidate, f"all forget more than {forgetting_at_most:g} bits per byte; this one the least"


@dataclass(frozen=True, slots=True)
class _Scores:
    """Sums of each candidate and domain over clusters of documents: nats, and the bytes that they are of."""

    candidates: list[str]
    domains: list[str]
    nats_D: dict[tuple[str, str], NDArray[np.float64]]
    bytes_D: dict[str, NDArray[np.float64]]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> _Scores:
        """Gathers rows by candidate, domain and cluster, and checks that all candidates saw the same documents."""
        nats: dict[tuple[str, str], dict[str, float]] = {}
        sizes: dict[tuple[str, str], dict[str, float]] = {}
        documents: dict[tuple[str, str], set[str]] = {}
        for row in rows:
            key, cluster = (row["candidate"], row["domain"]), str(row.get("cluster", row["document"]))
            for table, field in ((nats, "nll"), (sizes, "bytes")):
                sums = table.setdefault(key, {})
                sums[cluster] = sums.get(cluster, 0.0) + float(row[field])
            documents.setdefault(key, set()).add(str(row["document"]))
        names = list(dict.fromkeys(candidate for candidate, _ in nats))
        domains = list(dict.fromkeys(domain for _, domain in nats))
        if BASE not in names or len(domains) < 2 or GENERAL not in domains:
            raise DataError(
                f"The referee needs scores of {BASE!r}, of {GENERAL!r} and of a domain; got {names}, {domains}."
            )
        for domain in domains:
            for name in names:
                if documents.get((name, domain)) != documents.get((BASE, domain)):
                    raise DataError(
                        f"{name} and {BASE} were scored on different documents of {domain}: score both again."
                    )
        order = {domain: sorted(nats[BASE, domain]) for domain in domains}
        return cls(
            names,
            [domain for domain in domains if domain != GENERAL],
            {(n, d): np.array([nats[n, d][c] for c in order[d]]) for n in names for d in domains},
            {d: np.array([sizes[BASE, d][c] for c in order[d]]) for d in domains},
        )

    def standing(self, name: str) -> Standing:
        """Returns the gain of a candidate on each domain and its forgetting."""
        gains = {domain: float(self._won(name, BASE, domain, None)[0]) for domain in self.domains}
        return Standing(
            name, float(np.mean(list(gains.values()))), -float(self._won(name, BASE, GENERAL, None)[0]), gains
        )

    def gain_interval(self, name: str, rival: str, seed: int) -> Facts:
        """Returns how much more a candidate gains than a rival, with the interval of a paired bootstrap."""
        drawn = {d: self._draw(d, seed + i) for i, d in enumerate(self.domains)}
        value = np.mean([self._won(name, rival, d, None) for d in self.domains], axis=0)
        samples = np.mean([self._won(name, rival, d, drawn[d]) for d in self.domains], axis=0)
        return _interval(float(value[0]), samples)

    def forgetting_interval(self, name: str, seed: int) -> Facts:
        """Returns how much worse than the base a candidate is on general text, with its interval."""
        samples = -self._won(name, BASE, GENERAL, self._draw(GENERAL, seed))
        return _interval(-float(self._won(name, BASE, GENERAL, None)[0]), samples)

    def _draw(self, domain: str, seed: int) -> NDArray[np.float64]:
        num = len(self.bytes_D[domain])
        drawn_SD = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES)
        return drawn_SD.astype(np.float64)

    def _won(self, name: str, rival: str, domain: str, counts_SD: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """Returns how many bits per byte `name` is better than `rival`, for each resample [S] or as they are [1]."""
        counts = np.ones((1, len(self.bytes_D[domain]))) if counts_SD is None else counts_SD
        nats_S = counts @ (self.nats_D[rival, domain] - self.nats_D[name, domain])
        return np.asarray(nats_S / (math.log(2) * np.maximum(counts @ self.bytes_D[domain], 1.0)))


def _interval(value: float, samples_S: NDArray[np.float64]) -> Facts:
    low, high = np.quantile(samples_S, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def _plain(standing: Standing) -> Facts:
    return {
        "candidate": standing.candidate,
        "gain": standing.gain,
        "forgetting": standing.forgetting,
        "gain_by_domain": standing.gain_by_domain,
        "on_front": standing.on_front,
    }
