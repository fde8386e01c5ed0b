"""What the Ray launcher decides, on a runtime of a few lines; `tests/launch` flies it by the thousand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.launch import LauncherConfig, RayConfig
from qlora_dist.errors import ConfigError, LaunchError
from qlora_dist.launch import ray_runtime
from qlora_dist.launch.base import Job, State
from qlora_dist.launch.compose import compose_run
from qlora_dist.launch.ray import Command, LostError, RayLauncher, UnreachableError, argv_of
from qlora_dist.launch.ray_runtime import no_ray, require_listener, resolve
from qlora_dist.launch.ray_worker import Worker
from qlora_dist.launch.sizing import Resources, Sizing


class Cluster:
    """A cluster that does what a test tells it; groups and workers are numbers."""

    def __init__(self, *cpus: float) -> None:
        self.cpus, self.time, self.codes = list(cpus), 0.0, {}
        self.asked: dict[int, list[Resources]] = {}
        self.ran: list[Command] = []
        self.stopped: list[int] = []
        self.is_silent = False

    def now(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds

    def nodes(self) -> list[Resources]:
        if self.is_silent:
            raise UnreachableError("no answer")
        return [{"CPU": cpus} for cpus in self.cpus]

    def free(self) -> Resources:
        return {"CPU": sum(self.cpus)}

    def reserve(self, name: str, bundles: Sequence[Resources]) -> int:
        if self.is_silent:
            raise UnreachableError("no answer")
        self.asked[len(self.asked)] = list(bundles)
        return len(self.asked) - 1

    def place(self, group: int) -> list[tuple[int, str, int]] | None:
        bundles = self.asked[group]
        if sum(bundle["CPU"] for bundle in bundles) > sum(self.cpus):
            return None
        return [(10 * group + number, f"10.0.0.{number}", 29500) for number in range(len(bundles))]

    def run(self, worker: int, command: Command) -> None:
        self.ran.append(command)

    def run_task(self, name: str, needs: Resources, command: Command) -> int:
        self.ran.append(command)
        return -len(self.ran)

    def ended(self, worker: int) -> int | None:
        code = self.codes.get(worker)
        if isinstance(code, str):
            raise LostError(code)
        return code

    def stop(self, worker: int) -> None:
        self.stopped.append(worker)
        self.codes.setdefault(worker, 75)

    def release(self, group: Any, workers: Sequence[int]) -> None:
        self.codes = {worker: code for worker, code in self.codes.items() if worker not in workers}


def training(tmp_path: Path, processes: int = 4) -> Job:
    return Job(
        name="adapter/a",
        argv=[],
        worker=["-m", "qlora_dist.pipeline", "PLAN", "NODE"],
        log=tmp_path / "a.log",
        nodes=["adapter/a"],
        words=[tmp_path / "a.failed.json"],
        processes=processes,
        sizes=[1, 2, 4],
        cores=processes,
    )


def launcher(cluster: Cluster, **ray: Any) -> RayLauncher:
    return RayLauncher(LauncherConfig(ray=RayConfig(**{"wait_s": 60.0, "give_up_s": 600.0} | ray)), cluster)


def after(cluster: Cluster, launching: RayLauncher, seconds: float, step_s: float = 5.0) -> State:
    for _ in range(int(seconds / step_s)):
        cluster.time += step_s
        launching.poll()
    return launching.poll()["adapter/a"]


def test_a_job_runs_under_torchrun_on_each_node_with_one_rendezvous(tmp_path: Path):
    cluster = Cluster(3, 1)
    launching = launcher(cluster)
    launching.submit(training(tmp_path))
    assert after(cluster, launching, 10) is State.running
    assert cluster.asked[0] == [{"CPU": 3.0}, {"CPU": 1.0}]
    first, second = (command.argv[1:] for command in cluster.ran)
    assert "--nproc-per-node=3" in first and "--node-rank=0" in first
    assert "--nproc-per-node=1" in second and "--node-rank=1" in second
    assert all({"--nnodes=2", "--master-addr=10.0.0.0", "--master-port=29500"} <= set(argv) for argv in (first, second))
    cluster.codes = {0: 0, 1: 0}
    assert after(cluster, launching, 5) is State.done


def test_a_job_that_lost_a_node_is_run_again_on_what_is_left(tmp_path: Path):
    cluster = Cluster(2, 2)
    launching = launcher(cluster, min_workers=1, max_workers=4)
    launching.submit(training(tmp_path))
    after(cluster, launching, 5)
    cluster.codes = {0: "the node died"}
    cluster.cpus = [2]
    assert after(cluster, launching, 60) is State.waiting, "all its nodes are waited for first"
    assert after(cluster, launching, 60) is State.running
    assert cluster.asked[max(cluster.asked)] == [{"CPU": 2.0}]
    assert cluster.ran[-1].environment["QLORA_DIST_ELASTIC"] == "1"


def test_a_job_that_took_fewer_grows_again_when_nodes_come(tmp_path: Path):
    cluster = Cluster(2)
    launching = launcher(cluster, min_workers=1, max_workers=4)
    launching.submit(training(tmp_path))
    assert after(cluster, launching, 90) is State.running
    cluster.cpus = [2, 2]
    after(cluster, launching, 90)
    assert cluster.stopped, "it was asked to stop with a checkpoint"
    assert sum(bundle["CPU"] for bundle in cluster.asked[max(cluster.asked)]) == 4
    assert "QLORA_DIST_ELASTIC" not in cluster.ran[-1].environment


def test_without_bounds_a_job_waits_for_all_its_processes_and_then_says_what_is_missing(tmp_path: Path):
    cluster = Cluster(2)
    launching = launcher(cluster)
    job = training(tmp_path)
    launching.submit(job)
    assert after(cluster, launching, 590) is State.waiting
    assert after(cluster, launching, 30) is State.failed
    assert "needs 4 x (1 CPU), and the nodes have: 2 CPU" in job.words[0].read_text()


def test_its_own_error_is_not_retried_a_checkpoint_is_gone_on_with(tmp_path: Path):
    cluster = Cluster(1)
    launching = launcher(cluster)
    job = training(tmp_path, processes=1)
    launching.submit(job)
    after(cluster, launching, 5)
    cluster.codes = {0: 75}
    assert after(cluster, launching, 10) is State.running
    cluster.codes = {10: 1}
    assert after(cluster, launching, 10) is State.failed
    assert len(cluster.ran) == 2


def test_a_silent_cluster_is_borne_for_a_while(tmp_path: Path):
    cluster = Cluster(4)
    launching = launcher(cluster)
    launching.submit(training(tmp_path))
    cluster.is_silent = True
    assert after(cluster, launching, 500) is State.waiting
    with pytest.raises(LaunchError, match="Ray has not answered for 600 s"):
        after(cluster, launching, 200)


def test_a_stage_that_takes_too_long_is_stopped_and_goes_on_from_its_checkpoint(tmp_path: Path):
    cluster = Cluster(1)
    launching = RayLauncher(LauncherConfig(timeout_s={"adapter": 100.0}), cluster)
    launching.submit(training(tmp_path, processes=1))
    assert after(cluster, launching, 200) is State.running
    assert cluster.stopped and len(cluster.ran) >= 2


def test_light_stages_are_plain_tasks(tmp_path: Path):
    cluster = Cluster(1)
    launching = launcher(cluster)
    launching.submit(Job(name="rows/a", argv=[], worker=["-c", "pass"], log=tmp_path / "r.log", nodes=["rows/a"]))
    assert launching.poll()["rows/a"] is State.running
    assert not cluster.asked
    cluster.codes = {-1: 0}
    assert launching.poll()["rows/a"] is State.done


def test_what_a_stage_asks_for_can_be_added_to(tmp_path: Path):
    sizing = Sizing(RayConfig(resources={"adapter": {"spot": 1.0, "CPU": 3.0}}))
    assert sizing.needs(training(tmp_path), 2) == {"CPU": 6.0, "spot": 2.0}
    assert not sizing.fits(training(tmp_path), 1, [{"CPU": 64.0}])
    assert sizing.fits(training(tmp_path), 2, [{"CPU": 64.0, "spot": 2.0}])


def test_sizes_stand_between_the_bounds_and_divide_the_step(tmp_path: Path):
    job = training(tmp_path)
    assert Sizing(RayConfig()).sizes(job) == [4]
    assert Sizing(RayConfig(min_workers=1, max_workers=4)).sizes(job) == [4, 2, 1]
    assert Sizing(RayConfig(min_workers=2, max_workers=3)).sizes(job) == [2]


def test_one_process_has_no_torchrun(tmp_path: Path):
    assert "torch.distributed.run" not in argv_of(training(tmp_path))
    assert "--standalone" in argv_of(training(tmp_path), [4])


def test_nobody_at_an_address_is_said_at_once_with_the_repair():
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"):
        with pytest.raises(LaunchError, match=r"no Ray answers.*ray start --head"):
            require_listener(address, resolve(address))
    assert "RAY_ADDRESS" in str(no_ray("", "reason"))


@pytest.mark.parametrize("address", ["somewhere", "http://head:8265"])
def test_an_address_that_is_none_is_refused(address: str):
    with pytest.raises(ConfigError, match=r"launcher\.ray\.address"):
        compose_run(["+experiment=legal", "launcher=ray", f"launcher.ray.address={address}"])


def test_bounds_that_cross_are_refused():
    crossed = ["launcher.ray.min_workers=4", "launcher.ray.max_workers=2"]
    with pytest.raises(ConfigError, match=r"min_workers=4: expected at most launcher\.ray\.max_workers = 2"):
        compose_run(["+experiment=legal", "launcher=ray", *crossed])


def test_a_worker_runs_a_command_and_hands_back_its_word(tmp_path: Path):
    word = tmp_path / "w.failed.json"
    job = Job(name="x", argv=[], log=tmp_path / "deep" / "x.log", words=[word])
    code = f"import os; open({str(word)!r}, 'w').write('said'); print(os.environ['A']); raise SystemExit(3)"
    answer = Worker().run(Command(argv=["python", "-c", code], environment={"A": "heard"}, job=job))
    assert answer == (3, {str(word): b"said"})
    assert job.log.read_text() == "heard\n"


def test_a_client_whose_server_did_not_come_up_asks_again(monkeypatch):
    ray = pytest.importorskip("ray", reason="pip install 'qlora_dist[ray]'")
    monkeypatch.setattr(ray_runtime, "CLIENT_WAIT_S", 0.0)
    asked = []

    def init(address: str, **settings: object):
        asked.append((address, settings))
        if len(asked) < 3:
            raise ConnectionAbortedError(
                "Initialization failure from server:\nTraceback\nRuntimeError: Starting Ray client server failed."
            )

    monkeypatch.setattr(ray, "init", init)
    ray_runtime.connect("ray://head:10001", {"log_to_driver": False})
    assert asked == [("ray://head:10001", {"log_to_driver": False})] * 3


def test_a_client_that_is_refused_for_another_reason_is_told_so_at_once(monkeypatch):
    ray = pytest.importorskip("ray", reason="pip install 'qlora_dist[ray]'")

    def init(address: str, **settings: object):
        raise ConnectionAbortedError("Initialization failure from server:\nTraceback\nRuntimeError: version mismatch")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionAbortedError):
        ray_runtime.connect("ray://head:10001", {})
    assert ray_runtime.shortened("a:\nTraceback\n\nb: c\n") == "a: b: c"
    assert ray_runtime.shortened("") == "no reason given"
