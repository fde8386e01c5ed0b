"""The one loop: K lanes over one frozen base, on one process or many, stopped and continued at any step."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora_dist.errors import Preempted, TrainError
from qlora_dist.runtime import Progress, log, log_metrics
from qlora_dist.train.checkpoint import Checkpoint, lane_state, restore
from qlora_dist.train.course import Course, where_to_continue
from qlora_dist.train.first_steps import Watch, check_finite, check_order, check_read, rows_digest
from qlora_dist.train.memory import peak_memory_bytes
from qlora_dist.train.processes import naming_who_is_missing, same_on_all_ranks
from qlora_dist.train.speed import utilization
from qlora_dist.train.step import Stepper, StepResult


class Ending(Protocol):
    """What the loop does with lanes that have ended, well or with an error; every rank calls it alike."""

    def __call__(self, ended: list[Course]) -> None:
        """Checks, measures and saves those that ended well; notes why the others ended."""


Between = Callable[[Sequence[Course], bool], bool]
"""Is called on every rank alike between turns, and before a life's first one (then with True). It may replace a
course's factors, move its step, or end it; if it did, it says so, and the change is kept in a checkpoint."""


@dataclass(slots=True)
class Clock:
    """Tells the speed so far and the time since the last checkpoint."""

    started: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    tokens: int = 0

    def tokens_per_s(self, tokens: int) -> float:
        """Adds a turn's tokens and returns the mean speed since the start."""
        self.tokens += tokens
        return self.tokens / max(time.monotonic() - self.started, 1e-9)

    def since_saved(self) -> float:
        """Returns the seconds since the last checkpoint."""
        return time.monotonic() - self.saved

    def note_saved(self) -> None:
        """Notes that a checkpoint was written."""
        self.saved = time.monotonic()


@dataclass(slots=True)
class Loop:
    """Trains all lanes to the ends of their budgets, or to a request to stop.

    A turn takes one step of every lane that still runs. Each lane counts its own steps, so that lanes that were
    stopped at different places go on together. A lane whose loss is lost ends alone.

    Raises:
        Preempted: after SIGTERM or SIGUSR2, once the turn is finished and every running lane's checkpoint written.
    """

    stepper: Stepper
    courses: list[Course]
    checkpoint_every_s: float
    log_every_steps: int = 1
    ending: Ending = lambda ended: None
    between: Between | None = None
    group: str = ""
    """Names the lanes that are together in this job, so that they continue from a turn they have in common."""
    turn: int = 0
    _clock: Clock = field(default_factory=Clock)

    def run(self) -> None:
        """Trains until no lane runs."""
        self._resume()
        last = max((c.lane.budget.num_steps - c.step for c in self.courses), default=0) + self.turn
        progress = Progress(last)
        progress.update(self.turn)
        self._clock = Clock()
        with stop_on_signal(self.stepper):
            self._pause(self.courses, is_first=True)
            self._end([c for c in self.courses if not c.is_running])
            while running := {k: c for k, c in enumerate(self.courses) if c.is_running}:
                self.take_turn(running, progress)
                if all(c.is_running for c in running.values()):
                    self._keep(list(running.values()))
                self._pause(list(running.values()))
                if ended := [c for c in running.values() if not c.is_running]:
                    self._keep(list(running.values()), must=True)  # together, before one of them counts as done
                    self._end(ended)

    def take_turn(self, running: dict[int, Course], progress: Progress) -> None:
        """Takes one step of every running lane, checks and logs it."""
        watches = {k: Watch(c.lane.parameters, c.step == 0) for k, c in running.items() if c.step < c.first_step + 2}
        with naming_who_is_missing(self.turn):
            results = self.stepper.take({k: c.step for k, c in running.items()}, self.turn)
        self.turn += 1
        for k, course in running.items():
            course.step += 1
            try:
                found = {"loss": results[k].loss, "grad_norm": results[k].grad_norm}
                check_finite(course.certificate, course.step, found)
                if k in watches:
                    watches[k].check(course.certificate)
                if course.config is not None and course.step == course.first_step + 1:
                    check_read(course.certificate, course.config, not course.told_as)
            except TrainError as error:
                course.fail(error)
        self._tell(running, results, progress)

    def _resume(self) -> None:
        """Has every lane continue from where it was kept, the same on every rank."""
        strategy = self.stepper.strategy
        found: list[Checkpoint | None] = [None] * len(self.courses)
        if strategy.rank == 0:
            found = where_to_continue(self.courses, self.group)
            for course, checkpoint in zip(self.courses, found, strict=True):
                if checkpoint is not None:
                    restore(course.lane, checkpoint.tensors())
                    log.info("%s continues after step %d", course.lane.name, checkpoint.step)
        places = [
            [c.step, c.turn if c.group == self.group else 0, c.rows] if c else [0, 0, rows_digest(course.lane, 0)]
            for course, c in zip(self.courses, found, strict=True)
        ]
        places_K3 = torch.tensor(places, device=strategy.device)
        strategy.broadcast([places_K3, *(v for c in self.courses for v in lane_state(c.lane).values())])
        for course, (step, _, _) in zip(self.courses, places_K3.tolist(), strict=True):
            course.step = course.first_step = step
            if strategy.rank == 0:
                keep_metrics(course.metrics, step)
        strategy.scatter([c.lane for c in self.courses])
        self.turn = int(places_K3[:, 1].max())
        self._check_order(places_K3[:, 2].tolist())

    def _check_order(self, kept: list[int]) -> None:
        """Ends each lane whose next rows are not, on every rank, those that it was to go on with."""
        strategy = self.stepper.strategy
        own = [rows_digest(course.lane, course.step) for course in self.courses]
        other_K = torch.tensor([float(a != b) for a, b in zip(kept, own, strict=True)], device=strategy.device)
        strategy.sum_over_ranks([other_K])
        for course, num_other, was, now in zip(self.courses, other_K.tolist(), kept, own, strict=True):
            try:
                check_order(course.certificate, was, now, int(num_other), strategy.world_size)
            except TrainError as error:
                course.fail(error)

    def _tell(self, running: dict[int, Course], results: dict[int, StepResult], progress: Progress) -> None:
        tokens = sum(c.lane.train.tokens_per_step for c in running.values())
        speed = {"tokens_per_s": self._clock.tokens_per_s(tokens)}
        speed |= utilization(self.stepper, [c.lane for c in running.values()], speed["tokens_per_s"])
        for k, course in running.items():
            values = {key: getattr(results[k], key) for key in ("loss", "learning_rate", "grad_norm")}
            if course.step % self.log_every_steps == 0 or not course.is_running:
                shared = speed | {"memory_bytes": peak_memory_bytes()}
                log_metrics(course.step, values | shared, lane=course.told_as)
        losses = sorted(results[k].loss for k in running)
        told = {"loss": losses[len(losses) // 2]} | ({"lanes": len(running)} if len(self.courses) > 1 else {})
        if len(running) == 1:
            (only,) = running
            told |= {"learning_rate": results[only].learning_rate, "grad_norm": results[only].grad_norm}
        progress.update(self.turn, **told, **speed)

    def _pause(self, courses: list[Course], is_first: bool = False) -> None:
        if self.between is not None and (self.between(courses, is_first) or self.stepper.wants_stop):
            self._keep(courses, must=True)

    def _keep(self, courses: list[Course], must: bool = False) -> None:
        """Writes checkpoints when it is time, or some lane has ended; stops when any rank was asked to."""
        kept = [c for c in courses if c.error is None]
        stop = self.stepper.wants_stop and any(c.is_running for c in kept)
        strategy = self.stepper.strategy
        if must or stop or strategy.agree(self._clock.since_saved() >= self.checkpoint_every_s):
            with strategy.gathered([c.lane for c in kept]):
                for c in kept if strategy.rank == 0 else ():
                    next_rows = rows_digest(c.lane, c.step)
                    c.checkpoints.save(c.step, lane_state(c.lane), turn=self.turn, group=self.group, rows=next_rows)
            self._clock.note_saved()
        if stop:
            with naming_who_is_missing(self.turn):  # torchrun ends a node's processes once one of them has left
                same_on_all_ranks("rank 0 has written it")
            raise Preempted(f"Stopped on request after step {self.turn}. Run the same command to continue.")

    def _end(self, ended: list[Course]) -> None:
        if ended:
            self.ending(ended)


@contextmanager
def stop_on_signal(stepper: Stepper) -> Iterator[None]:
    """Turns SIGTERM and SIGUSR2 into the wish to stop after the running step."""

    def wish(*_: Any) -> None:
        stepper.asked_to_stop = True

    before = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_metrics(path: Path, steps: int) -> None:
    """Drops the lines of steps that will be taken again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
