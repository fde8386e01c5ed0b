"""The launcher that runs jobs on this machine, as many at once as its cores, memory and GPUs allow."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.errors import bad_value
from qlora_dist.launch.base import Job, Machine, State
from qlora_dist.launch.lives import Lives
from qlora_dist.pipeline.__main__ import LAUNCHER_VARIABLE

GRACE_S = 15.0
"""How long a job may take to end after SIGTERM, before SIGKILL."""
TIMED_OUT = -signal.SIGKILL
"""What a job that was ended for its time counts as, unless it left a checkpoint: killed."""


def this_machine() -> Machine:
    """Measures the cores this process may use, the memory that is free, and the GPUs it may see."""
    return Machine(
        cores=len(os.sched_getaffinity(0)), memory_bytes=psutil.virtual_memory().available, gpus=len(visible_gpus())
    )


def visible_gpus() -> list[str]:
    """Returns the names of the GPUs this process may use, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    cards = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i, _ in enumerate(cards.iterdir())] if cards.is_dir() else []


class LocalLauncher:
    """Starts each job as a process group of its own, with its output in the job's log file."""

    outlives = False

    def __init__(self, machine: Machine, config: LauncherConfig | None = None) -> None:
        self._machine = machine
        self._config = config or LauncherConfig()
        self._jobs: dict[str, Job] = {}
        self._states: dict[str, State] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._gpus: dict[str, list[str]] = {}
        self._started: dict[str, float] = {}
        self._overdue: dict[str, float] = {}
        self._lives = Lives(self._config)

    def check(self, jobs: Sequence[Job]) -> None:
        """Passes: this machine runs what it can, one job at a time if need be.

        Raises:
            ConfigError: for a job of more processes than there are GPUs, where there are any: each takes one.
        """
        for job in jobs:
            if 0 < job.gpus < job.processes:
                wanted = f"at most {job.gpus}, the GPUs of this machine that CUDA_VISIBLE_DEVICES leaves"
                repair = f"Set strategy.world_size={job.gpus}."
                raise bad_value("strategy.world_size", job.processes, wanted, repair)

    def submit(self, job: Job) -> None:
        """Takes a job; it starts in a later `poll`."""
        self._jobs[job.name] = job
        self._states[job.name] = State.waiting

    def poll(self) -> Mapping[str, State]:
        """Takes note of what has ended, skips what can't run any more, and starts what fits."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._states[name]  # one that is run again comes after those that wait already
                self._states[name] = self._end_of(name, process.returncode)
                del self._processes[name]
                self._gpus.pop(name, None)
            else:
                self._mind_time(name, process)
        for name in [n for n, state in self._states.items() if state is State.waiting]:
            job = self._jobs[name]
            can_start = job.can_start(self._states.get(other, State.cached) for other in job.after)
            if can_start is False:
                self._states[name] = State.skipped
            elif can_start and self._lives.is_rested(name) and self._fits(job):
                self._start(job)
        return dict(self._states)

    def cancel(self) -> None:
        """Sends SIGTERM to each job's process group, SIGKILL after `GRACE_S`."""
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and any(p.poll() is None for p in self._processes.values()):
            time.sleep(0.1)
        for name, process in self._processes.items():
            _signal(process, signal.SIGKILL)
            process.wait()
            self._states[name] = State.cancelled
        self._processes.clear()
        self._states |= {n: State.cancelled for n, state in self._states.items() if state is State.waiting}

    def _end_of(self, name: str, code: int) -> State:
        """Reads the end of a job's life; one that stopped with a checkpoint, or was killed, waits to be run again."""
        job = self._jobs[name]
        if not self._overdue.pop(name, 0.0):
            return self._lives.after(job, code)
        state = self._lives.after(job, code or TIMED_OUT)
        if state is State.failed:
            job.leave_word(timed_out(job, self._config.timeout_s[job.stage]), 1)
        return state

    def _mind_time(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Asks a job that takes too long to end, and ends it after `GRACE_S`."""
        limit, now = self._config.timeout_s.get(self._jobs[name].stage), time.monotonic()
        if limit is None or now - self._started[name] < limit:
            return
        if name not in self._overdue:
            self._overdue[name] = now
            _signal(process, signal.SIGTERM)
        elif now - self._overdue[name] > GRACE_S:
            _signal(process, signal.SIGKILL)

    def _fits(self, job: Job) -> bool:
        running = [self._jobs[name] for name in self._processes]
        if not running:
            return True
        return (
            len(running) < (self._config.max_parallel or len(self._jobs))
            and sum(other.cores for other in running if not (job.meets and other.meets)) + job.cores
            <= self._machine.cores
            and sum(other.memory_bytes for other in running) + job.memory_bytes <= self._machine.memory_bytes
            and sum(other.gpus for other in running) + job.gpus <= self._machine.gpus
        )

    def _start(self, job: Job) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        for word in job.words:
            word.unlink(missing_ok=True)
        environment = os.environ | job.environment | {LAUNCHER_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if job.gpus:
            taken = {gpu for gpus in self._gpus.values() for gpu in gpus}
            self._gpus[job.name] = [gpu for gpu in visible_gpus() if gpu not in taken][: job.gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[job.name])
        with job.log.open("ab") as log:
            self._processes[job.name] = subprocess.Popen(
                job.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._states[job.name] = State.running
        self._started[job.name] = time.monotonic()


def timed_out(job: Job, limit_s: float) -> str:
    """Says that a job took longer than its stage may, and what to do."""
    repair = f"Look for where it hangs in its log, or raise launcher.timeout_s.{job.stage}."
    return f"It took longer than launcher.timeout_s.{job.stage}={limit_s:g} seconds, and was ended. {repair}"


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
