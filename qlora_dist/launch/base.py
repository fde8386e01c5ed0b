"""What every launcher is given, and what it answers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from qlora_dist.errors import PeerLost, Preempted
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


class End(Enum):
    """How one life of a job ended, and so what follows."""

    done = "done"
    again = "again"
    """It stopped with a checkpoint and wants to go on."""
    lost = "lost"
    """It was killed, or lost a machine or another of its processes: no fault of its own."""
    failed = "failed"
    """Its own error: the same again would fail the same."""


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
    meets: bool = False
    """It waits for others that meet it: they should run at the same time, though they share cores."""
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

    def end(self, code: int) -> End:
        """Tells how a life ended from what its nodes left word of, else from the process's own exit code.

        torchrun answers 1 whatever its processes answered, so words come first: `75`, run me again, before others. A
        process that loses another leaves word too, but the error of the one that failed counts before it. Who was
        killed leaves no word.
        """
        if code == 0:
            return End.done
        told = self._told()
        if Preempted.exit_code in (*told, code):
            return End.again
        if any(other != PeerLost.exit_code for other in told):
            return End.failed
        return End.lost if told or _was_killed(code) or self.processes > 1 else End.failed

    def exit_code(self, code: int) -> int:
        """Returns the code that its nodes left word of, as `end` weighs them, else the process's own."""
        told = self._told() if code else []
        again = Preempted.exit_code
        return again if again in told else next(iter(sorted(told, key=PeerLost.exit_code.__eq__)), code)

    def _told(self) -> list[int]:
        return [code for word in self.words if (code := _told(word)) is not None]

    def leave_word(self, message: str, code: int) -> None:
        """Leaves word of why it failed, for those of its nodes that left none."""
        for word in self.words:
            if not word.exists():
                word.parent.mkdir(parents=True, exist_ok=True)
                write_json(word, {"node": self.name, "message": message, "exit_code": code, "rank": 0})


def _told(word: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads(word.read_text(encoding="utf-8"))["exit_code"])
    return None


def _was_killed(code: int) -> bool:
    """Says that an exit code is a signal's: negative in Python, above 128 in a shell; not an interrupt's 130."""
    return code < 0 or (code > 128 and code != 130)


class Launcher(Protocol):
    """Runs jobs somewhere. `Job.can_start` says when, and whether at all, a job starts."""

    outlives: bool
    """Says that the jobs go on when this process ends, to the closing of the run, which is a job too."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Passes if these jobs can be taken; nothing was started or written before.

        Raises:
            LaunchError: naming what is in the way, and the repair.
        """

    def submit(self, job: Job) -> None:
        """Takes a job; those named in `job.after` were submitted before, or are finished already."""

    def poll(self) -> Mapping[str, State]:
        """Moves things on, and returns the state of every job by its name."""

    def cancel(self) -> None:
        """Ends what runs, gently first; waiting jobs are cancelled."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine has to give: whole cores, bytes of memory, GPUs; `is_shared` by the jobs of one stage."""

    cores: int
    memory_bytes: int
    gpus: int = 0
    is_shared: bool = True
