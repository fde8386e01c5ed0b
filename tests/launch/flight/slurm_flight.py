"""Flights on a simulated Slurm: the arrays that a plan is arranged in, on nodes that fail, with nobody watching."""

from __future__ import annotations

from collections.abc import Callable

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.launch.base import Machine, State
from qlora_dist.launch.jobs import forget_failures, make_jobs
from qlora_dist.launch.slurm.arrays import arrange
from qlora_dist.launch.slurm.limit import hold_to
from qlora_dist.launch.slurm.shape import shape_of
from qlora_dist.pipeline.plan import Node, Plan
from tests.launch.flight.fake_slurm import FakeSlurm, Task
from tests.launch.flight.flight import (
    CORES,
    FAULTS_UNTIL_S,
    LONGEST_S,
    NUM_NODES,
    POLL_S,
    Calm,
    Flight,
    check,
    simulated,
    unless,
)
from tests.launch.flight.world import World


def fly_slurm(seed: int, num_faults: int | None = None) -> Flight:
    """Flies one plan on a simulated Slurm, where nobody watches: what is there at the end is what counts."""
    with simulated(seed) as (world, plan):
        flight, chance, calm = Flight(seed), world.chance, Calm()
        slurm = FakeSlurm(world, plan, NUM_NODES, CORES, retries=LauncherConfig().retries)
        slurm.most_at_once = chance.choice([0, 0, 1, 2, 3])
        slurm.limit_s = chance.uniform(150, 400) if chance.random() < 0.3 else float("inf")
        for _ in range(chance.randint(0, 5) if num_faults is None else num_faults):
            world.after(chance.uniform(0, FAULTS_UNTIL_S), unless(calm, _drawn_on_slurm(world, slurm)))
        flight.first = _run_on_slurm(world, plan, slurm, flight)
        flight.happened = world.happened
        check(plan, flight, flight.first)
        if not all(state.is_good for state in flight.first.values()):
            calm.has_come, slurm.is_silent_until, world.disk_full_until = True, 0.0, 0.0
            slurm.limit_s = float("inf")
            flight.second = _run_on_slurm(world, plan, slurm, flight)
            check(plan, flight, flight.second)
            unfinished = [name for name, state in flight.second.items() if not state.is_good]
            if unfinished:
                flight.wrong.append(f"the same command again left {', '.join(unfinished)}")
        flight.seconds = world.now - 1_000_000.0
        return flight


def _run_on_slurm(world: World, plan: Plan, slurm: FakeSlurm, flight: Flight) -> dict[str, State]:
    """Submits what is not finished as arrays, and looks when the queue is empty."""
    finished = plan.store.finished(node.id for node in plan.nodes)
    forget_failures(plan, finished)
    jobs = make_jobs(plan, [n for n in plan.nodes if n.id not in finished], Machine(cores=2, memory_bytes=1 << 40), 0)
    config = LauncherConfig()
    arrays = arrange(jobs, {job.name: shape_of(job, config).name for job in jobs}, most_tasks=2)
    hold_to(slurm.most_at_once, arrays)
    slurm.submit(arrays)
    end = world.now + LONGEST_S
    while not slurm.is_idle:
        world.advance(POLL_S)
        if world.now > end:
            flight.wrong.append("the queue never emptied")
            break
    if slurm.most_at_once and slurm.most_running > slurm.most_at_once:
        flight.wrong.append(f"{slurm.most_running} jobs ran at once, where {slurm.most_at_once} may")
    return {node.name: _found(plan, node) for node in plan.nodes}


def _found(plan: Plan, node: Node) -> State:
    if plan.store.is_finished(node.id):
        return State.done
    return State.failed if plan.failure_path(node).exists() else State.skipped


def _drawn_on_slurm(world: World, slurm: FakeSlurm) -> Callable[[], None]:
    """Draws one fault; whom it hits is drawn when it comes."""
    chance = world.chance

    def lose() -> None:
        node = chance.choice(slurm.nodes)
        if node.is_up:
            slurm.lose(node, chance.uniform(0, 300), lives_on=chance.random() < 0.3)

    def of_running(act: Callable[[Task], None]) -> Callable[[], None]:
        def hit() -> None:
            running = [task for task in slurm.running() if task.process and task.process.is_alive]
            if running:
                act(chance.choice(running))

        return hit

    def pause_twin(task: Task) -> None:
        assert task.process is not None
        task.process.paused_until = world.now + chance.uniform(5, 200)
        world.say(f"process {task.process.pid} on {task.process.host} stands still")
        slurm.double(task)

    def silence() -> None:
        slurm.is_silent_until = world.now + chance.uniform(1, 200)
        world.say(f"the controller does nothing until {slurm.is_silent_until - 1_000_000:.0f}")

    def fill() -> None:
        world.disk_full_until = world.now + chance.uniform(5, 120)
        world.say(f"the disk is full until {world.disk_full_until - 1_000_000:.0f}")

    def slow() -> None:
        host = chance.choice(slurm.nodes).name
        world.lag_s[host] = chance.uniform(1, 45)
        world.say(f"{host} sees what others finish {world.lag_s[host]:.0f} s late")

    on_tasks = [slurm.preempt, slurm.requeue, slurm.double, pause_twin]
    return chance.choice([lose, lose, *map(of_running, on_tasks), silence, fill, slow])
