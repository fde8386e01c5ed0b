"""The launcher that runs a plan's jobs on Ray: a placement group a job, its command line under torchrun on each node.

Everything that is decided stands here, on a small `Runtime` that `ray_runtime` makes out of Ray and a simulation out of
nothing. A job is a command line, never a pickle: what Ray moves is where it runs.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.errors import LaunchError, Preempted
from qlora_dist.launch.base import Job, State
from qlora_dist.launch.lives import Lives
from qlora_dist.launch.local import TIMED_OUT, timed_out
from qlora_dist.launch.sizing import Resources, Sizing
from qlora_dist.runtime import ELASTIC_VARIABLE

KILLED = -signal.SIGKILL
SETTLE_S = 60.0
"""How long a job's other nodes are waited for after one failed: the first to fall may have lost another."""
GRACE_S = 30.0
"""How long a job may take to end once it was asked to, before it is killed."""


class LostError(Exception):
    """The node that a command ran on, or Ray's worker there, is gone; why is in the message."""


class UnreachableError(Exception):
    """Ray did not answer; it may later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What runs on one node, and what its exit code is told by."""

    argv: list[str]
    environment: dict[str, str]
    job: Job


class Runtime(Protocol):
    """What the launcher asks of a cluster. Nothing here waits."""

    def now(self) -> float:
        """Returns seconds on a clock that only goes forward."""

    def nodes(self) -> list[Resources]:
        """Returns what each living node has in all, used or not."""

    def free(self) -> Resources:
        """Returns what is unused, all nodes together."""

    def reserve(self, name: str, bundles: Sequence[Resources]) -> Any:
        """Asks for bundles, each on one node; returns the group. A cluster that grows takes this as a wish."""

    def place(self, group: Any) -> list[tuple[Any, str, int]] | None:
        """Returns a worker in each bundle with its address and a free port there; None until all are there."""

    def run(self, worker: Any, command: Command) -> None:
        """Starts a command at a worker."""

    def run_task(self, name: str, needs: Resources, command: Command) -> Any:
        """Starts a command wherever what it needs is free; returns its worker."""

    def ended(self, worker: Any) -> int | None:
        """Returns the exit code of a worker's command, None while it runs.

        Raises:
            LostError: if the node or the worker is gone.
        """

    def stop(self, worker: Any) -> None:
        """Asks a worker's command to end, as SIGTERM does."""

    def release(self, group: Any, workers: Sequence[Any]) -> None:
        """Ends workers at once and gives their group back."""

    def pause(self, seconds: float) -> None:
        """Lets some time pass."""


@dataclass(slots=True)
class Attempt:
    """One life of a job."""

    shares: list[int]
    """The processes of each of its nodes."""
    since: float
    started_at: float = 0.0
    group: Any = None
    workers: list[Any] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    lost: str = ""
    stopped_at: float = 0.0
    ended_at: float = 0.0
    grows: bool = False
    is_overdue: bool = False
    larger_since: float = 0.0

    @property
    def size(self) -> int:
        """The number of its processes."""
        return sum(self.shares)

    @property
    def code(self) -> int:
        """The exit code of all its nodes together: what was asked for first, then an error, then a kill."""
        codes = {self.codes.get(number, KILLED) for number in range(len(self.workers))}
        if Preempted.exit_code in codes:
            return Preempted.exit_code
        return max(codes) if max(codes) > 0 else min(codes)

    @property
    def is_running(self) -> bool:
        """Says that its command was started."""
        return bool(self.workers)


class RayLauncher:
    """Runs jobs on a Ray cluster, each again on what is left of it when a node is lost."""

    outlives = False

    def __init__(self, config: LauncherConfig, runtime: Runtime) -> None:
        self._config, self._runtime, self._max_parallel = config.ray, runtime, config.max_parallel or 10**6
        self._sizing, self._timeouts = Sizing(config.ray), config.timeout_s
        self._jobs: dict[str, Job] = {}
        self._states: dict[str, State] = {}
        self._attempts: dict[str, Attempt] = {}
        self._lives = Lives(config, runtime.now)
        self._silent_since = 0.0

    def check(self, jobs: Sequence[Job]) -> None:
        """Passes: the cluster was reached when the launcher was opened, and what a job waits for may come."""

    def submit(self, job: Job) -> None:
        """Takes a job; it starts in a later `poll`."""
        self._jobs[job.name] = job
        self._states[job.name] = State.waiting

    def poll(self) -> Mapping[str, State]:
        """Takes note of what has ended or was lost, skips what can't run any more, and starts what can.

        Raises:
            LaunchError: if Ray has not answered for `launcher.ray.give_up_s`.
        """
        try:
            for name in list(self._attempts):
                self._look_at(name)
            for name in [name for name, state in self._states.items() if state is State.waiting]:
                self._consider(name)
            self._silent_since = 0.0
        except UnreachableError as error:
            self._bear(error)
        return dict(self._states)

    def cancel(self) -> None:
        """Asks what runs to end, and ends it after `GRACE_S`; waiting jobs are cancelled."""
        running = {name: attempt for name, attempt in self._attempts.items() if attempt.is_running}
        for attempt in running.values():
            self._stop(attempt)
        end = self._runtime.now() + GRACE_S
        while self._runtime.now() < end and any(not self._has_ended(attempt) for attempt in running.values()):
            self._runtime.pause(0.2)
        for name in list(self._attempts):
            self._release(name)
        self._states |= {n: State.cancelled for n, state in self._states.items() if not state.has_ended}

    def _bear(self, error: UnreachableError) -> None:
        now = self._runtime.now()
        self._silent_since = self._silent_since or now
        if now - self._silent_since > self._config.give_up_s:
            repair = "Look at its head node; the same command goes on from what is finished."
            raise LaunchError(f"Ray has not answered for {self._config.give_up_s:g} s ({error}). {repair}") from error

    # Starting

    def _consider(self, name: str) -> None:
        job = self._jobs[name]
        if name in self._attempts:
            return
        can_start = job.can_start(self._states.get(other, State.cached) for other in job.after)
        if can_start is False:
            self._states[name] = State.skipped
        elif can_start and self._may_begin(name):
            self._begin(name, job)

    def _may_begin(self, name: str) -> bool:
        return self._lives.is_rested(name) and len(self._attempts) < self._max_parallel

    def _begin(self, name: str, job: Job) -> None:
        for word in job.words:
            word.unlink(missing_ok=True)
        if self._sizing.is_light(job):
            command = Command(argv=argv_of(job), environment=job.environment, job=job)
            worker = self._runtime.run_task(name, self._sizing.needs(job, 1), command)
            now = self._runtime.now()
            self._attempts[name] = Attempt(shares=[1], since=now, started_at=now, workers=[worker])
            self._states[name] = State.running
        else:
            self._reserve(name, job, self._sizing.sizes(job)[0])

    def _reserve(self, name: str, job: Job, size: int) -> None:
        shares = self._sizing.shares(job, size, self._runtime.nodes())
        group = self._runtime.reserve(name, [self._sizing.needs(job, share) for share in shares])
        self._attempts[name] = Attempt(shares=shares, since=self._runtime.now(), group=group)

    def _start_placed(self, name: str, attempt: Attempt) -> None:
        """Starts the command on every node once all bundles are there; takes fewer processes when they don't come."""
        job = self._jobs[name]
        try:
            placed = self._runtime.place(attempt.group)
        except LostError as error:
            self._release(name)
            self._after_loss(name, str(error))
            return
        if placed is None:
            self._wait_or_shrink(name, job, attempt)
            return
        attempt.workers, attempt.started_at = [worker for worker, _, _ in placed], self._runtime.now()
        elastic = {ELASTIC_VARIABLE: "1"} if attempt.size != job.processes else {}
        for number, worker in enumerate(attempt.workers):
            argv = argv_of(job, attempt.shares, number, master=placed[0][1:])
            self._runtime.run(worker, Command(argv=argv, environment=job.environment | elastic, job=job))
        self._states[name] = State.running

    def _wait_or_shrink(self, name: str, job: Job, attempt: Attempt) -> None:
        now, nodes, sizing = self._runtime.now(), self._runtime.nodes(), self._sizing
        if now - attempt.since < self._config.wait_s or sizing.fits(job, attempt.size, nodes):
            return  # a cluster that is only busy is waited for
        smaller = [size for size in sizing.sizes(job) if size < attempt.size and sizing.fits(job, size, nodes)]
        if smaller:
            self._runtime.release(attempt.group, [])
            self._reserve(name, job, smaller[0])
        elif now - attempt.since > self._config.give_up_s:
            self._release(name)
            self._fail(name, sizing.complaint(job, nodes))

    # Ending

    def _look_at(self, name: str) -> None:
        attempt = self._attempts[name]
        if not attempt.is_running:
            self._start_placed(name, attempt)
            return
        if self._has_ended(attempt):
            self._release(name)
            self._conclude(name, attempt)
        elif not attempt.stopped_at:
            job = self._jobs[name]
            attempt.is_overdue = self._runtime.now() - attempt.started_at > self._timeouts.get(job.stage, math.inf)
            attempt.grows = not attempt.is_overdue and self._could_grow(job, attempt)
            if attempt.is_overdue or attempt.grows:
                self._stop(attempt)

    def _has_ended(self, attempt: Attempt) -> bool:
        """Collects what ended; says that all did, or that the rest need not be waited for any longer."""
        now = self._runtime.now()
        for rank, worker in enumerate(attempt.workers):
            if rank in attempt.codes:
                continue
            try:
                code = self._runtime.ended(worker)
            except LostError as error:
                attempt.lost, code = str(error), KILLED
            if code is not None:
                attempt.codes[rank] = code
        if len(attempt.codes) == len(attempt.workers):
            return True
        if attempt.lost or any(attempt.codes.values()):
            attempt.ended_at = attempt.ended_at or now
            if attempt.lost or now - attempt.ended_at > SETTLE_S:
                self._stop(attempt)
        return bool(attempt.stopped_at) and now - attempt.stopped_at > GRACE_S

    def _conclude(self, name: str, attempt: Attempt) -> None:
        job, code = replace(self._jobs[name], processes=attempt.size), attempt.code
        if attempt.grows and code:
            self._states[name] = State.waiting
        elif attempt.lost and code:
            self._after_loss(name, attempt.lost)
        else:
            self._states[name] = self._lives.after(job, (code or TIMED_OUT) if attempt.is_overdue else code)
            if attempt.is_overdue and self._states[name] is State.failed:
                job.leave_word(timed_out(job, self._timeouts[job.stage]), LaunchError.exit_code)

    def _after_loss(self, name: str, why: str) -> None:
        self._states[name] = self._lives.after_loss(name)
        if self._states[name] is State.failed:
            repair = "Look at the cluster; the same command goes on from the last checkpoint."
            self._fail(name, f"{name} lost its node again: {why}. {repair}")

    def _fail(self, name: str, message: str) -> None:
        self._states[name] = State.failed
        self._jobs[name].leave_word(message, LaunchError.exit_code)

    def _stop(self, attempt: Attempt) -> None:
        if attempt.stopped_at:
            return
        attempt.stopped_at = self._runtime.now()
        for rank, worker in enumerate(attempt.workers):
            if rank not in attempt.codes:
                self._runtime.stop(worker)

    def _release(self, name: str) -> None:
        attempt = self._attempts.pop(name)
        self._runtime.release(attempt.group, attempt.workers)

    def _could_grow(self, job: Job, attempt: Attempt) -> bool:
        """Says that a job which had to take fewer processes could have more of them, for `wait_s` now."""
        now, larger = self._runtime.now(), [size for size in self._sizing.sizes(job) if size > attempt.size]
        if larger:
            nodes, free = self._runtime.nodes(), self._runtime.free()
            larger = [size for size in larger if self._sizing.fits(job, size, nodes)]
            larger = [size for size in larger if self._sizing.is_free(job, size - attempt.size, free)]
        attempt.larger_since = (attempt.larger_since or now) if larger else 0.0
        return bool(larger) and now - attempt.larger_since > self._config.wait_s


def argv_of(job: Job, shares: Sequence[int] = (1,), number: int = 0, master: tuple[str, int] = ("", 0)) -> list[str]:
    """Returns the command line of one node of a job: under torchrun where there are several processes.

    The rendezvous is static: c10d's orders ranks by arrival, and a job's ranks are to be the same in every life.
    """
    if sum(shares) == 1:
        return [sys.executable, *job.worker]
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={shares[number]}"]
    if len(shares) == 1:
        return [sys.executable, *torchrun, "--standalone", *job.worker]
    place = [f"--nnodes={len(shares)}", f"--node-rank={number}", "--rdzv-backend=static"]
    return [sys.executable, *torchrun, *place, f"--master-addr={master[0]}", f"--master-port={master[1]}", *job.worker]
