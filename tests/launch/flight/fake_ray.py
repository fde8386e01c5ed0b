"""A Ray without Ray: nodes, groups, actors and tasks of a simulated world, behind the launcher's `Runtime`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qlora_dist.launch.ray import Command, LostError, UnreachableError
from qlora_dist.launch.sizing import Resources
from qlora_dist.pipeline.plan import Plan
from tests.launch.flight.world import KILLED, Process, World, run_command

PEER_GONE = 1
"""What torchrun answers when the processes of another node are gone."""


@dataclass(eq=False)
class SimulatedNode:
    """A machine of the cluster; `is_known` while Ray thinks that it lives."""

    name: str
    cores: float
    is_known: bool = True
    used: float = 0.0
    processes: list[Process] = field(default_factory=list)


@dataclass(eq=False)
class Bundle:
    """A share of a node, and the command that runs there."""

    cores: float
    node: SimulatedNode | None = None
    process: Process | None = None
    code: int | None = None
    is_lost: bool = False
    is_given_back: bool = False
    siblings: list[Bundle] = field(default_factory=list)
    command: Command | None = None


class FakeRay:
    """The launcher's runtime over a world; `break_down` is what happens to it."""

    def __init__(self, world: World, plan: Plan, num_nodes: int, cores: float) -> None:
        self.world, self.plan = world, plan
        self.all_nodes = [SimulatedNode(f"node{number}", cores) for number in range(num_nodes)]
        self.bundles: list[Bundle] = []
        self.silent_until = 0.0

    # What the launcher asks

    def now(self) -> float:
        return self.world.now

    def pause(self, seconds: float) -> None:
        self.world.advance(seconds)

    def nodes(self) -> list[Resources]:
        self._answer()
        return [{"CPU": node.cores} for node in self.all_nodes if node.is_known]

    def free(self) -> Resources:
        self._answer()
        return {"CPU": sum(node.cores - node.used for node in self.all_nodes if node.is_known)}

    def reserve(self, name: str, bundles: Sequence[Resources]) -> list[Bundle]:
        self._answer()
        made = [Bundle(needs["CPU"]) for needs in bundles]
        for bundle in made:
            bundle.siblings = made
        self.bundles += made
        return made

    def place(self, group: list[Bundle]) -> list[tuple[Bundle, str, int]] | None:
        self._answer()
        if any(bundle.is_lost for bundle in group):
            raise LostError("the node died before the command was started")
        if all(bundle.node is None for bundle in group) and not self._allocate(group):
            return None
        return [(bundle, bundle.node.name, 29500) for bundle in group if bundle.node]

    def run(self, worker: Bundle, command: Command) -> None:
        self._answer()
        worker.command = command
        if not worker.is_lost:
            self._start(worker)

    def run_task(self, name: str, needs: Resources, command: Command) -> Bundle:
        bundle = self.reserve(name, [needs])[0]
        bundle.command = command
        self._try_task(bundle)
        return bundle

    def ended(self, worker: Bundle) -> int | None:
        self._answer()
        if worker.is_lost:
            raise LostError("the node died")
        return worker.code

    def stop(self, worker: Bundle) -> None:
        self._answer()
        if worker.process is not None:
            worker.process.ask_to_stop()

    def release(self, group: list[Bundle] | None, workers: Sequence[Bundle]) -> None:
        self._answer()
        for bundle in {id(b): b for b in [*(group or []), *workers]}.values():
            self._give_back(bundle)
            if bundle.process is not None and bundle.process.is_alive and not bundle.is_lost:
                self.world.kill(bundle.process)

    # What happens to it

    def lose(self, node: SimulatedNode, *, lives_on: bool, back_after_s: float) -> None:
        """Loses a node: what ran there is gone, or goes on unseen for a while; Ray notices later."""
        self.world.say(f"{node.name} is lost{', and goes on unseen' if lives_on else ''}")
        ran = [b for b in self.bundles if b.node is node and not b.is_given_back and b.code is None]
        for process in [p for p in node.processes if p.is_alive]:
            if lives_on:  # its Ray worker is gone, so it is asked to stop; a training does, with a checkpoint
                self.world.after(self.world.chance.uniform(1, 90), process.ask_to_stop)
            else:
                self.world.kill(process)
        self.world.after(self.world.chance.uniform(0.5, 30), lambda: self._notice(node, ran))
        self.world.after(back_after_s + 31, lambda: self._return(node))

    def preempt(self, process: Process) -> None:
        """Asks a process to stop, as a cluster does that wants its node."""
        self.world.say(f"process {process.pid} on {process.host} is asked to stop")
        process.ask_to_stop()

    def double(self, bundle: Bundle) -> None:
        """Starts a command a second time, on another node."""
        assert bundle.command is not None
        host = self.world.chance.choice([n for n in self.all_nodes if n is not bundle.node] or self.all_nodes)
        self.world.say(f"{bundle.command.job.name} is started twice, again on {host.name}")
        process = self.world.start(host.name, self._body(bundle.command, host.name), lambda code: None)
        host.processes.append(process)

    def _answer(self) -> None:
        if self.world.now < self.silent_until:
            raise UnreachableError("no answer")

    def _notice(self, node: SimulatedNode, ran: list[Bundle]) -> None:
        node.is_known = False
        for bundle in ran:
            bundle.is_lost = True
        for bundle in self.bundles:
            if bundle.node is node and not bundle.is_given_back:
                self._give_back(bundle)
        for bundle in ran:
            self._tell_siblings(bundle)

    def _return(self, node: SimulatedNode) -> None:
        if not node.is_known:
            self.world.say(f"{node.name} is back")
        node.is_known = True

    def _allocate(self, group: list[Bundle]) -> bool:
        free = {id(node): node.cores - node.used for node in self.all_nodes if node.is_known}
        where = []
        for bundle in group:
            node = next((n for n in self.all_nodes if free.get(id(n), 0.0) >= bundle.cores), None)
            if node is None:
                return False
            free[id(node)] -= bundle.cores
            where.append(node)
        for bundle, node in zip(group, where, strict=True):
            bundle.node = node
            node.used += bundle.cores
        return True

    def _try_task(self, bundle: Bundle) -> None:
        if bundle.is_given_back:
            return
        if self._allocate([bundle]):
            self._start(bundle)
        else:
            self.world.after(1.0, lambda: self._try_task(bundle))

    def _start(self, bundle: Bundle) -> None:
        assert bundle.node is not None and bundle.command is not None
        is_first = bundle.siblings[0] is bundle
        if not is_first:
            return  # its processes are moved by those of the first node: see `_end`
        host = bundle.node.name
        bundle.process = self.world.start(host, self._body(bundle.command, host), lambda code: self._end(bundle, code))
        bundle.node.processes.append(bundle.process)

    def _body(self, command: Command, host: str) -> Callable[[], int]:
        node_ids = command.argv[command.argv.index("qlora_dist.pipeline") + 2 :]
        return run_command(self.world, self.plan, host, node_ids)

    def _end(self, bundle: Bundle, code: int) -> None:
        """Takes the end of a job's first process as that of all its nodes, each a moment later than the one before."""
        assert bundle.command is not None
        told = PEER_GONE if code and bundle.command.job.processes > 1 else code  # torchrun answers 1 whatever happened
        for number, sibling in enumerate(bundle.siblings):
            self.world.after(number * 0.5, lambda s=sibling: self._set_code(s, told))

    def _set_code(self, bundle: Bundle, code: int) -> None:
        if bundle.code is None and not bundle.is_lost:
            bundle.code = code
        if bundle.process is None or not bundle.process.is_alive:
            self._give_back_task(bundle)

    def _give_back_task(self, bundle: Bundle) -> None:
        if len(bundle.siblings) == 1 and bundle.command and bundle.command.job.processes == 1:
            self._give_back(bundle)

    def _tell_siblings(self, lost: Bundle) -> None:
        """The processes of a job's other nodes fail when those of one are gone."""
        for sibling in lost.siblings:
            if sibling is lost or sibling.is_lost:
                continue
            if sibling.process is not None:
                self.world.kill(sibling.process)
            self.world.after(self.world.chance.uniform(0, 40), lambda s=sibling: self._set_code(s, PEER_GONE))

    def _give_back(self, bundle: Bundle) -> None:
        if not bundle.is_given_back and bundle.node is not None:
            bundle.node.used -= bundle.cores
        bundle.is_given_back = True

    def kill(self, bundle: Bundle) -> None:
        """Kills one command, as the kernel does when memory is short."""
        assert bundle.process is not None
        self.world.say(f"{bundle.command.job.name if bundle.command else '?'} is killed")
        self.world.kill(bundle.process)
        for sibling in bundle.siblings:
            self._set_code(sibling, KILLED if len(bundle.siblings) == 1 else 1)
