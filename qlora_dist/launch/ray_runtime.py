"""Ray itself, behind the launcher's `Runtime`: connecting, placement groups, actors and tasks. It is imported late."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.config.launch import RayConfig
from qlora_dist.errors import LaunchError
from qlora_dist.launch.base import Machine
from qlora_dist.launch.ray import Command, LostError, UnreachableError
from qlora_dist.launch.sizing import Resources
from qlora_dist.runtime import log

PROBE_S = 3.0
ANSWER_S = 30.0
CLIENT_ATTEMPTS, CLIENT_WAIT_S = 4, 2.0
NO_SERVER = ("Starting Ray client server failed", "Proxy failed to Connect to backend")
"""What Ray says when the server that it forks for each client dies at its start, or isn't up within 30 s."""
LOCAL_STORE_BYTES = 128 << 20
"""The object store of a cluster that is started here: jobs speak through artifacts, so it holds next to nothing."""


@contextmanager
def connected(config: RayConfig) -> Iterator[RayRuntime]:
    """Connects to the cluster that the config names, or starts one here, inside the `with` block.

    Raises:
        LaunchError: if Ray isn't installed, or none answers at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise LaunchError("launcher=ray: Ray isn't installed. pip install 'qlora_dist[ray]'.") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.runtime_env:
        settings["runtime_env"] = config.runtime_env
    if address:
        require_listener(config.address, resolve(address))
    else:
        settings |= {"include_dashboard": False, "object_store_memory": LOCAL_STORE_BYTES}
    try:
        connect(address, settings)
    except ray.exceptions.AuthenticationError as error:
        repair = "Give this machine the cluster's token (RAY_AUTH_TOKEN_PATH), or its mode (RAY_AUTH_MODE)."
        raise LaunchError(f"launcher.ray.address={config.address}: the cluster refuses the token. {repair}") from error
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise no_ray(config.address, shortened(str(error))) from error
    try:
        yield RayRuntime()
    finally:
        ray.shutdown()


def connect(address: str, settings: Mapping[str, Any]) -> None:
    """Connects this process; a client whose server at the other end didn't come up asks again."""
    import ray

    for attempt in range(1, CLIENT_ATTEMPTS + 1):
        try:
            ray.init(address=address or "local", **settings)
            return
        except ConnectionAbortedError as error:
            if attempt == CLIENT_ATTEMPTS or not any(words in str(error) for words in NO_SERVER):
                raise
            log.info("%s: %s Asked again.", address, shortened(str(error)))
            ray.shutdown()
            time.sleep(CLIENT_WAIT_S)


def shortened(message: str) -> str:
    """Returns what a message of Ray says, and for a traceback of another process what it ends in."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def resolve(address: str) -> str:
    """Returns `host:port` of an address; of `auto`, that of the cluster that runs on this machine, or nothing."""
    if address == "auto":
        from ray._private.utils import read_ray_address

        return str(os.environ.get("RAY_ADDRESS") or read_ray_address() or "")
    return address.removeprefix("ray://").partition("/")[0]


def require_listener(given: str, address: str) -> None:
    """Passes if something listens at an address: Ray itself would try for a minute, and say less.

    Raises:
        LaunchError: with the repair, within seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        wanted = "no cluster runs on this machine" if given == "auto" else f"{address or 'nothing'} is no host:port"
        raise no_ray(given, wanted)
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise no_ray(given, f"{host}:{port}: {error.strerror or error}") from error


def no_ray(given: str, reason: str) -> LaunchError:
    """Builds the complaint that no Ray answers."""
    repair = (
        "Start one (ray start --head), name one that runs (launcher.ray.address=HOST:6379 or ray://HOST:10001), "
        "or leave launcher.ray.address empty for one of this run's own."
    )
    shown = f"launcher.ray.address={given}" if given else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}"
    return LaunchError(f"{shown}: no Ray answers ({reason}). {repair}")


@dataclass(slots=True)
class Group:
    """A placement group, and the actors in its bundles once it is placed."""

    handle: Any
    bundles: list[Resources]
    actors: list[Any] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Work:
    """Where a command runs: an actor, or a task alone; and the answer that is awaited of it."""

    actor: Any = None
    answer: Any = None
    command: Command | None = None


class RayRuntime:
    """A cluster that this process is connected to."""

    def now(self) -> float:
        """Returns seconds on a clock that only goes forward."""
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        """Lets some time pass."""
        time.sleep(seconds)

    def machine(self, cpus_per_rank: int = 0) -> Machine:
        """Returns what the largest node has for all jobs of a stage, or what each process has, where that is told."""
        nodes = self.nodes()
        most = {key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in ("CPU", "GPU", "memory")}
        cores, is_shared = cpus_per_rank or max(1, int(most["CPU"])), not cpus_per_rank
        return Machine(cores, memory_bytes=int(most["memory"]), gpus=int(most["GPU"]), is_shared=is_shared)

    def nodes(self) -> list[Resources]:
        """Returns what each living node has in all, used or not."""
        import ray

        return [node["Resources"] for node in _asked(ray.nodes) if node["Alive"]]

    def free(self) -> Resources:
        """Returns what is unused, all nodes together."""
        import ray

        found: Resources = _asked(ray.available_resources)
        return found

    def reserve(self, name: str, bundles: Sequence[Resources]) -> Group:
        """Asks for a placement group whose bundles are packed on few nodes."""
        from ray.util.placement_group import placement_group

        return Group(_asked(lambda: placement_group(list(bundles), strategy="PACK")), list(bundles))

    def place(self, group: Group) -> list[tuple[Work, str, int]] | None:
        """Returns an actor in each bundle with its address and a free port there; None until all are there."""
        import ray

        if not group.actors:
            table = _asked(lambda: ray.util.placement_group_table(group.handle))
            if table.get("state") != "CREATED":
                return None
            group.actors = [_actor(group, index) for index in range(len(group.bundles))]
            group.places = [actor.place.remote() for actor in group.actors]
        ready, _ = _asked(lambda: ray.wait(group.places, num_returns=len(group.places), timeout=0))
        if len(ready) < len(group.places):
            return None
        return [(Work(actor), *_got(answer)) for actor, answer in zip(group.actors, group.places, strict=True)]

    def run(self, worker: Work, command: Command) -> None:
        """Starts a command at an actor."""
        worker.command = command
        worker.answer = worker.actor.run.remote(_portable(command))

    def run_task(self, name: str, needs: Resources, command: Command) -> Work:
        """Starts a command as a task, wherever what it needs is free."""
        import ray

        from qlora_dist.launch.ray_worker import run_alone

        task = ray.remote(run_alone).options(name=name, max_retries=0, **_options(needs))
        return Work(answer=_asked(lambda: task.remote(_portable(command))), command=command)

    def ended(self, worker: Work) -> int | None:
        """Returns the exit code of a worker's command, None while it runs.

        Raises:
            LostError: if the node or Ray's worker there is gone.
        """
        import ray

        ready, _ = _asked(lambda: ray.wait([worker.answer], timeout=0))
        if not ready:
            return None
        try:
            code, words = _got(worker.answer)
        except ray.exceptions.TaskCancelledError:
            return 130
        except ray.exceptions.RayTaskError as error:  # the command could not be started there
            assert worker.command is not None
            worker.command.job.leave_word(f"It could not be started: {error.cause}. See that root is shared.", 1)
            return 1
        for word, said in words.items():  # where the root is not shared, this machine hasn't got them
            path = Path(word)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(said)
        return int(code)

    def stop(self, worker: Work) -> None:
        """Asks a worker's command to end."""
        import ray

        if worker.actor is not None:
            worker.actor.stop.remote()
        else:
            ray.cancel(worker.answer, force=False)

    def release(self, group: Group | None, workers: Sequence[Work]) -> None:
        """Ends workers at once and removes their placement group."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if group is None:
            return
        ends = [actor.end.remote() for actor in group.actors]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(ends, num_returns=len(ends), timeout=2) if ends else None
        for actor in group.actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)
        _asked(lambda: remove_placement_group(group.handle))


def _actor(group: Group, index: int) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from qlora_dist.launch.ray_worker import Worker

    where = PlacementGroupSchedulingStrategy(group.handle, placement_group_bundle_index=index)
    options = _options(group.bundles[index])
    return ray.remote(Worker).options(scheduling_strategy=where, max_restarts=0, max_concurrency=3, **options).remote()


def _options(needs: Resources) -> dict[str, Any]:
    custom = {key: value for key, value in needs.items() if key not in ("CPU", "GPU", "memory")}
    named = {"num_cpus": needs.get("CPU", 0.0), "num_gpus": needs.get("GPU", 0.0), "resources": custom}
    return named | ({"memory": needs["memory"]} if "memory" in needs else {})


def _portable(command: Command) -> Command:
    """Returns a command without what only the driver can call."""
    from dataclasses import replace

    return replace(command, job=replace(command.job, has_inputs=bool))


def _got(answer: Any) -> Any:
    """Returns an answer that is there.

    Raises:
        LostError: if who was to give it is gone.
    """
    import ray

    gone = (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError, ray.exceptions.RayActorError)
    lost = (*gone, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError)
    try:
        return _asked(lambda: ray.get(answer, timeout=ANSWER_S))
    except lost as error:
        raise LostError(str(error).splitlines()[0]) from error


def _asked(question: Callable[[], Any]) -> Any:
    """Returns Ray's answer.

    Raises:
        UnreachableError: if there is none for now.
    """
    from ray import exceptions

    try:
        return question()
    except (ConnectionError, exceptions.GetTimeoutError, exceptions.RaySystemError, exceptions.RpcError) as error:
        raise UnreachableError(str(error).splitlines()[0]) from error
