"""A world in virtual time: hosts, processes that run this project's own code, and what befalls them.

A process is a greenlet that runs `pipeline.group.run_nodes` as it is, on real files below a real root. Its stages are
tiny (`stages.py`); what it would wait for, it waits for here. A kill is a greenlet that is never resumed: like SIGKILL
it runs no `finally`. Nothing in a flight depends on anything but its seed.
"""

from __future__ import annotations

import errno
import heapq
import io
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import greenlet

from qlora_dist.artifacts import owner as owners
from qlora_dist.artifacts import store as stores
from qlora_dist.artifacts.store import Manifest, Store
from qlora_dist.pipeline import run as running
from qlora_dist.pipeline.group import run_nodes
from qlora_dist.pipeline.plan import Plan

LEAST_SLEEP_S = 4.0
"""Who polls does so at most this often here: it changes little and saves half of the time."""
TERMINATED = -15
KILLED = -9


class Terminated(BaseException):
    """SIGTERM reached a process that does nothing about it."""


@dataclass(eq=False)
class Process:
    """One simulated process."""

    pid: int
    host: str
    started: float
    body: Callable[[], int]
    wakes_at: float
    on_end: Callable[[int], None] = lambda code: None
    is_alive: bool = True
    is_asked_to_stop: bool = False
    minds_stop: bool = False
    """A training, which finishes its step and writes a checkpoint; others die of SIGTERM."""
    paused_until: float = 0.0
    beaten_at: float = 0.0
    beats: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    let: Any = None

    def ask_to_stop(self) -> None:
        """Sends SIGTERM."""
        self.is_asked_to_stop = True


class World:
    """Time, hosts, processes, and the shared folder."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 1_000_000.0
        self.root = Path(tempfile.mkdtemp(prefix="flight", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.processes: list[Process] = []
        self.current: Process | None = None
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.disk_full_until = 0.0
        self.lag_s: dict[str, float] = {}
        self.finished: dict[str, tuple[float, str]] = {}
        self.happened: list[str] = []
        self.is_over = False
        self._numbers = itertools.count(100)
        self._hub = greenlet.getcurrent()

    # Time

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Lets something happen at a moment."""
        heapq.heappush(self.events, (when, next(self._numbers), act))

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Lets something happen after a while."""
        self.at(self.now + seconds, act)

    def advance(self, seconds: float) -> None:
        """Lets time pass: processes run, and things happen, in their order."""
        end = self.now + seconds
        while True:
            ready = [p for p in self.processes if p.is_alive]
            process = min(ready, key=lambda p: (max(p.wakes_at, p.paused_until), p.pid), default=None)
            wakes_at = max(process.wakes_at, process.paused_until) if process else float("inf")
            due = self.events[0][0] if self.events else float("inf")
            if min(wakes_at, due) > end:
                break
            self.now = max(self.now, min(wakes_at, due))
            if due <= wakes_at:
                heapq.heappop(self.events)[2]()
            elif process is not None:
                self._resume(process)
        self.now = end

    def sleep(self, seconds: float) -> None:
        """Lets the running process wait; it may never come back."""
        process = self.current
        if self.is_over or process is None:
            raise greenlet.GreenletExit
        process.wakes_at = self.now + seconds
        self._hub.switch()
        if self.is_over:
            raise greenlet.GreenletExit
        if process.is_asked_to_stop and not process.minds_stop:
            raise Terminated
        if self.now - process.beaten_at >= owners.BEAT_S:
            process.beaten_at = self.now
            for folder, me in process.beats:
                if not owners.beat(folder, me):
                    raise Terminated(75)

    def say(self, what: str) -> None:
        """Notes what happened, for whoever reads a failing flight."""
        self.happened.append(f"{self.now - 1_000_000:8.1f} {what}")

    # Processes

    def start(self, host: str, body: Callable[[], int], on_end: Callable[[int], None]) -> Process:
        """Starts a process on a host; it comes to work after the time that an interpreter takes."""
        wakes_at = self.now + self.chance.uniform(0.5, 4)
        process = Process(next(self._numbers), host, self.now, body, wakes_at, on_end)
        process.let = greenlet.greenlet(lambda: self._live(process))
        self.processes.append(process)
        return process

    def kill(self, process: Process) -> None:
        """Ends a process as SIGKILL does."""
        process.is_alive = False

    def end(self) -> None:
        """Ends the world: what was killed is unwound now, when nothing looks any more."""
        self.is_over = True
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            for process in self.processes:
                if process.let and not process.let.dead:
                    process.let.throw(greenlet.GreenletExit)
        shutil.rmtree(self.root, ignore_errors=True)

    def _live(self, process: Process) -> None:
        code = 1
        try:
            code = process.body()
        except Terminated as stop:
            code = int(stop.args[0]) if stop.args else TERMINATED
        if not self.is_over and process.is_alive:
            process.is_alive = False
            process.on_end(code)

    def _resume(self, process: Process) -> None:
        self.current = process
        try:
            process.let.switch()
        finally:
            self.current = None

    # Files

    def write(self, path: Path, text: str) -> None:
        """Writes a file as a stage does: on a full disk half of it."""
        if self.now < self.disk_full_until:
            path.write_text(text[: len(text) // 2], encoding="utf-8")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        path.write_text(text, encoding="utf-8")

    def write_json(self, path: Path, value: object) -> None:
        """Writes JSON as `runtime.write_json` does, on this world's disk."""
        aside = path.with_name(f".{path.name}.{self.current.pid if self.current else 0}")
        self.write(aside, json.dumps(value, sort_keys=True) + "\n")
        aside.replace(path)


class SimulatedHost(owners.Host):
    """What ownership sees of a host here."""

    def __init__(self, world: World) -> None:
        self._world = world

    def myself(self) -> dict[str, Any]:
        process = self._world.current
        assert process is not None
        return {"host": process.host, "pid": process.pid, "started": process.started}

    def is_alive(self, owner: dict[str, Any], folder: Path) -> bool:
        if owner["host"] != self.myself()["host"]:
            return super().is_alive(owner, folder)
        return any(p.is_alive and p.pid == owner["pid"] for p in self._world.processes)

    def now(self, folder: Path) -> float:
        return self._world.now

    def touch(self, path: Path) -> None:
        os.utime(path, (self._world.now, self._world.now))

    @contextmanager
    def beating(self, folder: Path, me: dict[str, Any]) -> Iterator[None]:
        process = self._world.current
        assert process is not None
        process.beats.append((folder, me))
        try:
            yield
        finally:
            process.beats.remove((folder, me))


class SharedStore(Store):
    """The real store on a shared file system: what one host finished, another sees a while later."""

    def __init__(self, root: Path, world: World, host: str) -> None:
        super().__init__(root)
        self._world, self._host = world, host

    def has(self, artifact_id: str) -> bool:
        return self._is_seen(artifact_id) and super().has(artifact_id)

    def is_finished(self, artifact_id: str) -> bool:
        return self._is_seen(artifact_id) and super().is_finished(artifact_id)

    def commit(self, manifest: Manifest) -> Path:
        folder = super().commit(manifest)
        self._world.finished.setdefault(manifest.id, (self._world.now, self._host))
        return folder

    def _is_seen(self, artifact_id: str) -> bool:
        when, host = self._world.finished.get(artifact_id, (0.0, self._host))
        return host == self._host or self._world.now >= when + self._world.lag_s.get(self._host, 0.0)


class Clock:
    """The `time` of modules that run in a simulated process."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now

    def sleep(self, seconds: float) -> None:
        self._world.sleep(max(seconds, LEAST_SLEEP_S))


def run_command(world: World, plan: Plan, host: str, node_ids: list[str]) -> Callable[[], int]:
    """Returns what a process does that was started as `python -m qlora_dist.pipeline PLAN NODE...` on a host."""

    def body() -> int:
        mine = Plan(
            experiment=plan.experiment, root=plan.root, command=plan.command, config=plan.config, nodes=plan.nodes
        )
        mine._store = SharedStore(Path(plan.root) / "artifacts", world, host)
        return run_nodes(mine, [mine.node(node_id) for node_id in node_ids])

    return body


@contextmanager
def inside(world: World) -> Iterator[None]:
    """Puts this world in the place of clock, disk and hosts, inside the `with` block; what is printed is kept quiet."""

    def point_before(function: Callable[..., Any]) -> Callable[..., Any]:
        def pausing(*args: Any) -> Any:
            if world.current is not None:
                world.sleep(world.chance.uniform(0, 0.5))  # so that a kill may come between
            return function(*args)

        return pausing

    replaced: list[tuple[Any, str, Any]] = [
        (owners, "HOST", SimulatedHost(world)),
        (owners, "write_json", world.write_json),
        (stores, "write_json", world.write_json),
        (stores, "_describe_files", point_before(stores._describe_files)),
        (stores, "_sync", point_before(lambda folder: None)),
        (running, "write_json", world.write_json),
        (running, "time", Clock(world)),
        (running, "circumstances", dict),
        (running, "SEEN_S", 60.0),
    ]
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(redirect_stdout(io.StringIO()))
        yield
