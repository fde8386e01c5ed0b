"""What every launcher is given, and what it answers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from qlora_dist.errors import Preempted
from qlora_dist.runtime import write_json


class State(Enum):
    """Where a job is in its life."""

    waiting = "waiting"
    running = "running"
    cached = "cached"
    done = "done"
    failed = "failed"
    skipped = "skipped"
    cancelled = "cancelled"

    @property
    def is_good(self) -> bool:
        """Says that what the job makes is there."""
        return self in (State.cached, State.done)

    @property
    def has_ended(self) -> bool:
        """Says that the job will not change any more."""
        return self not in (State.waiting, State.running)


@dataclass(kw_only=True, slots=True)
class Job:
    """A command line that makes some nodes, what it needs of a machine, and the jobs it comes after.

    A job with `any_node` starts once those before it have ended, though some may have failed: it makes those of its
    nodes whose inputs are there. Any other is skipped when one before it is not good.
    """

    name: str
    argv: list[str]
    log: Path
    nodes: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    any_node: bool = False
    has_inputs: Callable[[], bool] = bool
    """Says whether all that any one of its nodes reads is there."""
    words: list[Path] = field(default_factory=list)
    """Where each of its nodes leaves word of a failure."""
    environment: dict[str, str] = field(default_factory=dict)
    worker: list[str] = field(default_factory=list)
    """What follows `python` in each of its processes, without torchrun."""
    processes: int = 1
    sizes: list[int] = field(default_factory=lambda: [1])
    """The numbers of processes at which it can run: those by which its step divides."""
    cores: int = 1
    gpus: int = 0
    memory_bytes: int = 0

    @property
    def stage(self) -> str:
        """The stage of its nodes; a job's nodes are of one."""
        return re.split(r"[/+]", self.name)[0]

    def leave_word(self, message: str, code: int) -> None:
        """Leaves word of why it failed, for those of its nodes that left none."""
        for word in self.words:
            if not word.exists():
                word.parent.mkdir(parents=True, exist_ok=True)
                write_json(word, {"node": self.name, "message": message, "exit_code": code, "rank": 0})

    def can_start(self, before: Iterable[State]) -> bool | None:
        """Says whether it may start after jobs in these states: yes, never (False), or not yet (None)."""
        states = list(before)
        if not self.any_node and any(state.has_ended and not state.is_good for state in states):
            return False
        if not all(state.has_ended for state in states):
            return None
        if all(state.is_good for state in states):
            return True
        return self.has_inputs()

    def exit_code(self, code: int) -> int:
        """Returns how it ended: what its nodes left word of, else the process's own exit code.

        torchrun answers 1 whatever its processes answered, so words come first, and `75`, run me again, before others.
        """
        if code == 0:
            return 0
        told = []
        for word in self.words:
            with contextlib.suppress(OSError, ValueError, KeyError):
                told.append(int(json.loads(word.read_text(encoding="utf-8"))["exit_code"]))
        again = Preempted.exit_code
        return again if again in told else next(iter(told), code)


class Launcher(Protocol):
    """Runs jobs somewhere. `Job.can_start` says when, and whether at all, a job starts."""

    def submit(self, job: Job) -> None:
        """Takes a job; those named in `job.after` were submitted before, or are finished already."""

    def poll(self) -> Mapping[str, State]:
        """Moves things on, and returns the state of every job by its name."""

    def cancel(self) -> None:
        """Ends what runs, gently first; waiting jobs are cancelled."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine has to give: whole cores, bytes of memory, GPUs."""

    cores: int
    memory_bytes: int
    gpus: int = 0
