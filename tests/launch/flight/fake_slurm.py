"""A Slurm without Slurm: job arrays, what they wait for, nodes, requeues and time limits of a simulated world.

The arrays are those that the launcher arranges and would submit. What the text of a job does after its command has
ended (`ending`) is written here once more in Python; a test runs the text itself on every case, and compares.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_dist.errors import PeerLost, Preempted
from qlora_dist.launch.base import Job
from qlora_dist.launch.lives import MOST_LIVES
from qlora_dist.launch.slurm.arrays import Array
from qlora_dist.pipeline.plan import Plan
from tests.launch.flight.world import Process, World, run_command

TICK_S = 5.0


@dataclass(eq=False)
class SimulatedNode:
    """A machine; `is_up` while the controller thinks so."""

    name: str
    cores: float
    is_up: bool = True
    used: float = 0.0


@dataclass(eq=False)
class Task:
    """One task of an array."""

    array: Array
    index: int
    job: Job
    state: str = "PENDING"
    lives: int = 0
    losses: int = 0
    not_before: float = 0.0
    where: list[SimulatedNode] = field(default_factory=list)
    process: Process | None = None

    @property
    def has_ended(self) -> bool:
        """Says that Slurm does nothing more with it."""
        return self.state not in ("PENDING", "RUNNING")


def ending(code: int, told: Sequence[int], processes: int, lives: int, losses: int, retries: int) -> tuple[bool, bool]:
    """Says whether the text of a job has it run again, and whether that counts as a loss."""
    if code == 0:
        return False, False
    if code == Preempted.exit_code or Preempted.exit_code in told:
        return lives - 1 < MOST_LIVES, False
    if told and set(told) != {PeerLost.exit_code}:
        return False, False
    if told or processes > 1 or code > 128:
        return losses + 1 <= retries, True
    return False, False


class FakeSlurm:
    """A controller with nodes over a world."""

    def __init__(self, world: World, plan: Plan, num_nodes: int, cores: float, retries: int) -> None:
        self.world, self.plan, self.retries = world, plan, retries
        self.nodes = [SimulatedNode(f"node{number}", cores) for number in range(num_nodes)]
        self.tasks: list[Task] = []
        self.limit_s = float("inf")
        self.is_silent_until = 0.0
        self.most_at_once = 0
        self.most_running = 0

    def submit(self, arrays: Sequence[Array]) -> None:
        """Takes arrays, each after those that it waits for."""
        self.tasks = [Task(array, index, job) for array in arrays for index, job in array.tasks.items()]
        self._tick()

    @property
    def is_idle(self) -> bool:
        """Says that nothing waits or runs."""
        return all(task.has_ended for task in self.tasks)

    def running(self) -> list[Task]:
        """Returns the tasks that have nodes."""
        return [task for task in self.tasks if task.state == "RUNNING"]

    # What happens to it

    def lose(self, node: SimulatedNode, back_after_s: float, *, lives_on: bool) -> None:
        """Loses a node; the controller notices later and requeues what ran there, which may go on unseen."""
        self.world.say(f"{node.name} is lost{', and goes on unseen' if lives_on else ''}")
        for task in self.running():
            if node in task.where and task.process and not lives_on:
                self.world.kill(task.process)
        self.world.after(self.world.chance.uniform(1, 60), lambda: self._notice(node))
        self.world.after(61 + back_after_s, lambda: setattr(node, "is_up", True))

    def preempt(self, task: Task) -> None:
        """Takes a task's nodes: TERM, and KILL after a grace time; then it waits again."""
        self.world.say(f"{task.job.name} is preempted")
        process = task.process
        assert process is not None
        process.ask_to_stop()
        self.world.after(30, lambda: self._requeue_killed(task, process))

    def requeue(self, task: Task) -> None:
        """Requeues a task at once, as an administrator does."""
        self.world.say(f"{task.job.name} is requeued")
        assert task.process is not None
        self._requeue_killed(task, task.process)

    def double(self, task: Task) -> None:
        """Starts a task's command a second time, on another node."""
        node = self.world.chance.choice([n for n in self.nodes if n not in task.where] or self.nodes)
        self.world.say(f"{task.job.name} is started twice, again on {node.name}")
        self.world.start(node.name, self._body(task.job, node.name), lambda code: None)

    # What it does

    def _tick(self) -> None:
        if self.world.now >= self.is_silent_until:
            for task in self.tasks:
                if task.state == "PENDING" and self.world.now >= task.not_before:
                    self._consider(task)
        if not self.is_idle:
            self.world.after(TICK_S, self._tick)

    def _consider(self, task: Task) -> None:
        can_start = self._waits_for(task)
        if can_start is False:
            task.state = "CANCELLED"  # --kill-on-invalid-dep
        elif can_start:
            self._allocate(task)

    def _waits_for(self, task: Task) -> bool | None:
        """Says that what it waits for has ended well (True), never will (False), or not yet (None)."""
        answers = []
        for wait in task.array.waits:
            named = wait.tasks if wait.kind != "aftercorr" else (task.index,)
            others = [t for t in self.tasks if t.array.name == wait.array and (not named or t.index in named)]
            if not all(other.has_ended for other in others):
                answers.append(None)
            else:
                answers.append(wait.kind == "afterany" or all(other.state == "COMPLETED" for other in others))
        if False in answers:
            return False
        return None if None in answers else True

    def _allocate(self, task: Task) -> None:
        needed = float(min(task.job.cores, self.nodes[0].cores))
        node = next((n for n in self.nodes if n.is_up and n.cores - n.used >= needed), None)
        beside = sum(other.array is task.array for other in self.running())
        if node is None or beside >= (task.array.width or len(self.tasks)):
            return
        node.used += needed
        task.where, task.state, task.lives = [node], "RUNNING", task.lives + 1
        self.most_running = max(self.most_running, len(self.running()))
        for word in task.job.words:
            word.unlink(missing_ok=True)
        process = self.world.start(
            node.name, self._body(task.job, node.name), lambda code: self._end(task, process, code)
        )
        task.process = process
        life = task.lives
        if self.limit_s < float("inf"):
            self.world.after(self.limit_s - 60, lambda: self._is_life(task, life) and process.ask_to_stop())
            self.world.after(self.limit_s, lambda: self._time_out(task, life))

    def _body(self, job: Job, host: str) -> Callable[[], int]:
        return run_command(self.world, self.plan, host, job.worker[job.worker.index("qlora_dist.pipeline") + 2 :])

    def _end(self, task: Task, process: Process, code: int) -> None:
        """Does what the text of the job does when its command has ended."""
        if task.process is not process or task.state != "RUNNING":
            return  # a life that was requeued meanwhile
        if all(self.plan.store.is_finished(self.plan.node(name).id) for name in task.job.nodes):
            code = 0
        shell_code = 128 - code if code < 0 else (1 if code and task.job.processes > 1 else code)
        told = [code for word in task.job.words if (code := _code_in(word)) is not None]
        again, is_loss = ending(shell_code, told, task.job.processes, task.lives, task.losses, self.retries)
        task.losses += is_loss
        self._free(task)
        if again:
            task.state, task.not_before = "PENDING", self.world.now + self.world.chance.uniform(5, 120)
        else:
            task.state = "FAILED" if code else "COMPLETED"

    def _notice(self, node: SimulatedNode) -> None:
        node.is_up = False
        for task in self.running():
            if node in task.where:
                self._free(task)
                task.process = None  # which may live on
                task.state, task.not_before = "PENDING", self.world.now + self.world.chance.uniform(5, 120)

    def _requeue_killed(self, task: Task, process: Process) -> None:
        if task.process is process and task.state == "RUNNING":
            self.world.kill(process)
            self._free(task)
            task.state, task.not_before = "PENDING", self.world.now + self.world.chance.uniform(5, 120)

    def _time_out(self, task: Task, life: int) -> None:
        if self._is_life(task, life):
            self.world.say(f"{task.job.name} is out of time")
            assert task.process is not None
            self.world.kill(task.process)
            self._free(task)
            task.state = "TIMEOUT"

    def _is_life(self, task: Task, life: int) -> bool:
        return task.state == "RUNNING" and task.lives == life

    def _free(self, task: Task) -> None:
        for node in task.where:
            node.used -= float(min(task.job.cores, self.nodes[0].cores))
        task.where = []


def _code_in(word: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads(word.read_text(encoding="utf-8"))["exit_code"])
    return None
