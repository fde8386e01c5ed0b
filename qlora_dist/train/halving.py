"""Successive halving over lanes: which trial trains next, and how far. Pure decisions; nothing here trains.

The rule is ASHA's (arXiv 1810.05934, algorithm 2) with rungs in tokens: a trial goes on from a rung when it is among
the best of those that may, as many as `1/eta` of all that have reached it; else a free lane takes the next trial.
Lanes step together, so what is asynchronous there is a matter of counted turns here: the same results always lead to
the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile


@dataclass(frozen=True, slots=True)
class Result:
    """What a trial came to at a rung: bits per byte (inf when it was lost), what it forgot, whether it may go on."""

    value: float
    passes: bool = True
    forgetting: float = 0.0

    @property
    def is_eligible(self) -> bool:
        """Says whether it may go on, and win."""
        return self.passes and math.isfinite(self.value)


def rung_tokens(budget_tokens: int, eta: int, first_tokens: int = 0, tokens_per_step: int = 1) -> list[int]:
    """Returns the tokens at which trials are compared, the whole budget last; by default at 1/eta², 1/eta and 1.

    Rungs that fall into one step with the next are left out: a trial would be compared there with itself.
    """
    told = [-(-budget_tokens // eta**2), -(-budget_tokens // eta)]
    if first_tokens:
        told = list(takewhile(lambda tokens: tokens < budget_tokens, (first_tokens * eta**k for k in count())))
    by_step = {-(-tokens // tokens_per_step): tokens for tokens in reversed(told)}
    last = -(-budget_tokens // tokens_per_step)
    return [*sorted(tokens for step, tokens in by_step.items() if step < last), budget_tokens]


def rung_steps(num_steps: int, tokens_per_step: int, rungs: Sequence[int]) -> list[int]:
    """Returns the step after which a trial stops at each rung: whole steps, upwards; its own last step at the last."""
    return [min(num_steps, math.ceil(tokens / tokens_per_step)) for tokens in rungs[:-1]] + [num_steps]


@dataclass(slots=True)
class Halving:
    """The state of one halving: who runs towards which rung, and what was found at each rung.

    `steps[trial][rung]` is where a trial stops. At most `lanes` trials run at once.
    """

    steps: Sequence[Sequence[int]]
    eta: int
    lanes: int
    results: dict[tuple[int, int], Result] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    """The rung that each running trial is on its way to."""
    _at: dict[int, int] = field(default_factory=dict)
    _reached: dict[int, int] = field(default_factory=dict)

    @property
    def num_rungs(self) -> int:
        """How many rungs there are, the end of the budget among them."""
        return len(self.steps[0])

    def seat(self) -> None:
        """Gives free lanes to who goes on or begins, best first; then whoever has nothing to do waits."""
        while len(self.running) < self.lanes:
            chosen = self._promotable() or self._next_trial() or self._last_resort()
            if chosen is None:
                return
            trial, rung = chosen
            self.running[trial] = rung
            self._reached[trial] = rung

    def turns(self) -> int:
        """Returns the turns, one step of each running trial, until the first of them stops at its rung."""
        return min(self.steps[trial][rung] - self._at.get(trial, 0) for trial, rung in self.running.items())

    def position(self, trial: int) -> int:
        """Returns the step at which a trial stands, by the turns that were counted."""
        return self._at.get(trial, 0)

    def advance(self, turns: int) -> list[tuple[int, int]]:
        """Counts turns; returns each (trial, rung) that has arrived and now waits for `record`, by trial."""
        for trial, rung in self.running.items():
            self._at[trial] = min(self._at.get(trial, 0) + turns, self.steps[trial][rung])
        return sorted((t, r) for t, r in self.running.items() if self._at[t] == self.steps[t][r])

    def record(self, trial: int, rung: int, result: Result) -> None:
        """Notes what a trial came to at the rung that it ran to, and frees its lane."""
        assert self.running.pop(trial) == rung, "it ran to another rung"
        self.results[trial, rung] = result

    def finishers(self) -> list[int]:
        """Returns the trials that were trained to the end."""
        last = self.num_rungs - 1
        return sorted(trial for trial, rung in self.results if rung == last)

    def best(self, rung: int) -> list[int]:
        """Returns the trials that stopped at a rung, best first; of equal ones the earlier."""
        found = [(result.value, trial) for (trial, at), result in self.results.items() if at == rung]
        return [trial for _, trial in sorted(found)]

    def _promotable(self) -> tuple[int, int] | None:
        """Returns who goes on from the highest rung that anyone may go on from."""
        for rung in range(self.num_rungs - 2, -1, -1):
            reached = self.best(rung)
            eligible = [trial for trial in reached if self.results[trial, rung].is_eligible]
            for trial in eligible[: len(reached) // self.eta]:
                if self._reached[trial] == rung:
                    return trial, rung + 1
        return None

    def _next_trial(self) -> tuple[int, int] | None:
        begun = len(self._reached)
        return (begun, 0) if begun < len(self.steps) else None

    def _last_resort(self) -> tuple[int, int] | None:
        """Lets someone go on when otherwise no winner would reach the end.

        First the best that may, of the highest rung where one waits; if there is none, and nobody has come to the
        end at all, the one that forgot least.
        """
        last = self.num_rungs - 1
        ended = [self.results[trial, last] for trial in self.finishers()]
        if self.running or any(result.is_eligible for result in ended):
            return None
        waiting = {(t, r): self.results[t, r] for t, r in self.results if r < last and self._reached[t] == r}
        if able := [(-rung, result.value, trial) for (trial, rung), result in waiting.items() if result.is_eligible]:
            higher, _, trial = min(able)
            return trial, 1 - higher
        if any(math.isfinite(result.value) for result in ended):
            return None
        found = [(-r, result.forgetting, result.value, t) for (t, r), result in waiting.items()]
        if finite := [row for row in found if math.isfinite(row[2])]:
            higher, *_, trial = min(finite)
            return trial, 1 - higher
        return None


def play(halving: Halving, result_of: Callable[[int, int], Result]) -> Halving:
    """Plays a halving whose results are known beforehand, as (trial, rung) -> result; returns it, ended."""
    halving.seat()
    while halving.running:
        for trial, rung in halving.advance(halving.turns()):
            halving.record(trial, rung, result_of(trial, rung))
        halving.seat()
    return halving


def steps_taken(halving: Halving) -> dict[int, int]:
    """Returns how many steps each trial that began was trained."""
    furthest: dict[int, int] = {}
    for trial, rung in halving.results:
        furthest[trial] = max(furthest.get(trial, 0), halving.steps[trial][rung])
    return furthest
