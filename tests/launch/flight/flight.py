"""One flight: a plan run by a real launcher on a simulated cluster, with faults drawn by a seed, and what must hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from qlora_dist.artifacts.store import MANIFEST, Store
from qlora_dist.config.launch import LauncherConfig, RayConfig
from qlora_dist.launch.base import Launcher, Machine, State
from qlora_dist.launch.jobs import forget_failures, make_jobs, node_states
from qlora_dist.launch.ray import RayLauncher
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.stages import STAGES
from tests.launch.flight.fake_ray import Bundle, FakeRay
from tests.launch.flight.stages import NUM_RECORDS, make_plan, tiny_stages
from tests.launch.flight.world import World, inside

LONGEST_S = 12 * 3600.0
"""A plan that takes longer, in the world's own time, never ends."""
POLL_S = 5.0
NUM_NODES, CORES = 3, 2.0
FAULTS_UNTIL_S = 400.0


@dataclass
class Flight:
    """What became of a flight."""

    seed: int
    first: dict[str, State] = field(default_factory=dict)
    second: dict[str, State] = field(default_factory=dict)
    happened: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    made: dict[str, dict[str, str]] = field(default_factory=dict)
    """The digest of each file of each finished artifact, but of those that name the life that wrote them."""
    seconds: float = 0.0

    def __str__(self) -> str:
        states = {name: state.name for name, state in self.first.items()}
        return f"seed {self.seed}: {'; '.join(self.wrong)}\n" + "\n".join([*self.happened, str(states)])


def fly_ray(seed: int, num_faults: int | None = None) -> Flight:
    """Flies one plan on a simulated Ray. `num_faults` overrides how many the seed would draw."""
    with simulated(seed) as (world, plan):
        flight = Flight(seed)
        ray = FakeRay(world, plan, NUM_NODES, CORES)
        bounds = {"min_workers": 1, "max_workers": 2} if world.chance.random() < 0.5 else {}
        config = LauncherConfig(ray=RayConfig(wait_s=30.0, give_up_s=3600.0, **bounds))
        calm = Calm()
        faults = world.chance.randint(0, 5) if num_faults is None else num_faults
        for _ in range(faults):
            world.after(world.chance.uniform(0, FAULTS_UNTIL_S), unless(calm, _drawn(world, ray)))
        flight.first = _run(world, plan, RayLauncher(config, ray), flight)
        flight.happened = world.happened
        check(plan, flight, flight.first)
        if not all(state.is_good for state in flight.first.values()):
            calm.has_come, ray.silent_until, world.disk_full_until = True, 0.0, 0.0
            flight.second = _run(world, plan, RayLauncher(config, ray), flight)
            check(plan, flight, flight.second)
            unfinished = [name for name, state in flight.second.items() if not state.is_good]
            if unfinished:
                flight.wrong.append(f"the same command again left {', '.join(unfinished)}")
        flight.seconds = world.now - 1_000_000.0
        return flight


@dataclass
class Calm:
    """Says that nothing happens any more: whoever runs the command again has mended what was broken."""

    has_come: bool = False


def unless(calm: Calm, fault: Callable[[], None]) -> Callable[[], None]:
    """Returns a fault that does not come any more once calm has."""
    return lambda: None if calm.has_come else fault()


def _drawn(world: World, ray: FakeRay) -> Callable[[], None]:
    """Draws one fault; whom it hits is drawn when it comes."""
    chance = world.chance

    def lose() -> None:
        node = chance.choice(ray.all_nodes)
        if node.is_known:
            ray.lose(node, lives_on=chance.random() < 0.3, back_after_s=chance.uniform(0, 300))

    def of_running(act: Callable[..., None]) -> Callable[[], None]:
        def hit() -> None:
            running = [b for b in ray.bundles if b.process and b.process.is_alive and not b.is_lost]
            if running:
                act(chance.choice(running))

        return hit

    def pause(bundle: Bundle) -> None:
        assert bundle.process is not None
        bundle.process.paused_until = world.now + chance.uniform(5, 200)
        world.say(f"process {bundle.process.pid} on {bundle.process.host} stands still")

    def pause_twin(bundle: Bundle) -> None:
        pause(bundle)
        ray.double(bundle)

    def silence() -> None:
        ray.silent_until = world.now + chance.uniform(1, 200)
        world.say(f"Ray does not answer until {ray.silent_until - 1_000_000:.0f}")

    def fill() -> None:
        world.disk_full_until = world.now + chance.uniform(5, 120)
        world.say(f"the disk is full until {world.disk_full_until - 1_000_000:.0f}")

    def slow() -> None:
        host = chance.choice(ray.all_nodes).name
        world.lag_s[host] = chance.uniform(1, 45)
        world.say(f"{host} sees what others finish {world.lag_s[host]:.0f} s late")

    faults = [lose, lose, of_running(lambda b: ray.preempt(b.process)), of_running(ray.double), of_running(pause_twin)]
    return chance.choice([*faults, of_running(ray.kill), silence, fill, slow])


def _run(world: World, plan: Plan, launcher: Launcher, flight: Flight) -> dict[str, State]:
    """Does what `launch.drive` does; returns how each node ended."""
    finished = plan.store.finished(node.id for node in plan.nodes)
    states = {node.name: State.cached for node in plan.nodes if node.id in finished}
    forget_failures(plan, finished)
    jobs = make_jobs(plan, [n for n in plan.nodes if n.id not in finished], Machine(cores=2, memory_bytes=1 << 40), 0)
    for job in jobs:
        launcher.submit(job)
    end = world.now + LONGEST_S
    while not all(state.has_ended for state in states.values()) or len(states) < len(plan.nodes):
        states |= node_states(plan, jobs, launcher.poll())
        world.advance(POLL_S)
        if world.now > end:
            flight.wrong.append("the plan never ended")
            break
    return states


def check(plan: Plan, flight: Flight, states: dict[str, State]) -> None:
    """Notes what of a flight is wrong: half an artifact, a record that is lost or counted twice, a traceback."""
    store = Store(Path(plan.root) / "artifacts")
    for word in plan.folder.glob("logs/*.failed.json"):
        if "fault of the program" in (said := json.loads(word.read_text())["message"]):
            flight.wrong.append(said)
    for folder in store.root.glob("*/*"):
        if folder.suffix == ".partial" or folder.name.startswith("."):
            continue
        if not (folder / MANIFEST).exists():
            flight.wrong.append(f"{folder.name} is half written")
            continue
        store.verify(f"{folder.parent.name}/{folder.name}")
    made = [node.id for node in plan.nodes if store.is_finished(node.id)]
    files = {name: store.manifest(name).files.items() for name in made}
    flight.made = {n: {f: e["sha256"] for f, e in found if not f.endswith(".life")} for n, found in files.items()}
    for node in plan.nodes:
        if states.get(node.name) in (State.done, State.cached) and not store.is_finished(node.id):
            flight.wrong.append(f"{node.name} is called done and isn't finished")
    merged = plan.node("merged/all")
    if store.is_finished(merged.id):
        _count(store, merged, flight)


def _count(store: Store, merged: Node, flight: Flight) -> None:
    """Every record was trained on once, by one adapter."""
    seen = json.loads((store.folder(merged.id) / "merged.json").read_text())
    records = sorted(int(record) for records in seen.values() for record in records)
    if records != list(range(NUM_RECORDS)):
        flight.wrong.append(f"records were lost or counted twice: {records}")


@contextmanager
def simulated(seed: int) -> Iterator[tuple[World, Plan]]:
    """Makes a world and a plan from a seed, inside the `with` block."""
    world = World(seed)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    with ExitStack() as stack:
        stack.callback(world.end)
        stack.enter_context(mock.patch.dict(os.environ, environment | {"QLORA_DIST_LAUNCHER": "1"}, clear=True))
        stack.enter_context(mock.patch.dict(STAGES, tiny_stages(world)))
        stack.enter_context(mock.patch.object(Node, "told", lambda node: node.config))
        stack.enter_context(inside(world))
        world_size = world.chance.choice([1, 1, 2, 4])
        yield world, make_plan(world.root, world.chance.randint(1, 3), world_size, step=4)
