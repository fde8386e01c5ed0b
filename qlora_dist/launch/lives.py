"""How often a job is run again, and after what wait: one rule for every launcher that restarts jobs itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.launch.base import End, Job, State

MOST_LIVES = 100
"""How often a job that stops with a checkpoint is run again."""


@dataclass(slots=True)
class Lives:
    """Counts the lives of each job.

    One that stopped with a checkpoint goes on at once. One that was killed, timed out or lost a machine is run again
    `launcher.retries` times, after `launcher.retry_wait_s`, twice that, four times that. Its own error ends it.
    """

    config: LauncherConfig
    now: Callable[[], float] = time.monotonic
    _again: dict[str, int] = field(default_factory=dict)
    _lost: dict[str, int] = field(default_factory=dict)
    _rests_until: dict[str, float] = field(default_factory=dict)

    def after(self, job: Job, code: int) -> State:
        """Returns the state of a job whose life ended with this exit code; `waiting` if it is to be run again."""
        end = job.end(code)
        if end is End.done:
            return State.done
        if end is End.again:
            self._again[job.name] = self._again.get(job.name, 0) + 1
            return State.waiting if self._again[job.name] < MOST_LIVES else State.failed
        if end is End.lost:
            return self.after_loss(job.name)
        return State.failed

    def after_loss(self, name: str) -> State:
        """Returns the state of a job that lost its machine or was killed."""
        lost = self._lost[name] = self._lost.get(name, 0) + 1
        if lost > self.config.retries:
            return State.failed
        self._rests_until[name] = self.now() + self.config.retry_wait_s * 2 ** (lost - 1)
        return State.waiting

    def is_rested(self, name: str) -> bool:
        """Says that a job's wait after a loss is over."""
        return self.now() >= self._rests_until.get(name, 0.0)
