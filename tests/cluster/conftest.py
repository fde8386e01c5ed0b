"""One plan run three times: by this machine alone, on a real Slurm and on a real Ray, where machines and jobs end."""

import os
import re
import shutil
import subprocess

import pytest

from tests.cluster.plans import (
    CLIENT_PORT,
    LIMIT_S,
    ON_RAY,
    ON_SLURM,
    PLAN,
    S3,
    STAGING,
    ClusterRun,
    checkpoints,
    logs_of,
    wait_for,
    watching,
)
from tests.cluster.ray_cluster import RAY, RayCluster
from tests.cluster.slurm_cluster import SlurmCluster, queue, running, said
from tests.pipeline.conftest import Workplace, make_workplace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a cluster waits for a whole run there."""
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.timeout(2 * LIMIT_S))


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    """The run of this machine alone, which goes on beside the clusters; one thread a process, as they have."""
    workplace = make_workplace(tmp_path_factory.mktemp("here"))
    with (workplace.folder / "said").open("wb") as output:
        command = ["taskset", "-c", "0", *workplace.command(*PLAN)]
        process = subprocess.Popen(command, cwd=workplace.folder, stdout=output, stderr=output)
    yield workplace, process
    if process.poll() is None:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def local(here) -> Workplace:
    """The same once it has ended."""
    workplace, process = here
    assert process.wait(LIMIT_S) == 0, (workplace.folder / "said").read_text()[-3000:]
    return workplace


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm of three nodes with two CPUs each."""
    if os.geteuid() != 0:
        pytest.skip("host names of its own want root: run `sudo make cluster-test`")
    if shutil.which("sbatch") is None:
        pytest.skip("apt-get install munge slurmctld slurmd slurm-client")
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=3, cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def on_slurm(slurm: SlurmCluster, here, tmp_path_factory) -> ClusterRun:
    """One run from submit to report, whose launcher is killed once all is submitted.

    A training is preempted by signal once it has a checkpoint, and the controller is away when it ends. A
    node of a later life, of this or the other training, dies in the middle. It is back at once, so that Slurm itself
    does not miss it.
    """
    run = ClusterRun(make_workplace(tmp_path_factory.mktemp("on_slurm")))
    process = run.workplace.start(*PLAN, *ON_SLURM)
    ids = run.workplace.run_folder / "slurm" / "001" / "ids"
    wait_for(lambda: (ids.exists() and "close_0" in ids.read_text()) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    process.kill()
    process.wait()
    watch = watching(run.workplace)
    try:
        task, _ = wait_for(lambda: checkpoints(run.workplace) and running("adapter"))[0]
        run.look()
        said("scancel", "--signal=TERM", task)
        wait_for(lambda: "death signal" in logs_of(run.workplace, "adapter"))
        slurm.stop_controller()
        wait_for(lambda: re.search("Unable to contact|to be run again", logs_of(run.workplace, "adapter")))
        slurm.start_controller()
        wait_for(lambda: "to be run again" in logs_of(run.workplace, "adapter"))
        before = checkpoints(run.workplace)
        _, nodes = wait_for(lambda: checkpoints(run.workplace) - before and running("adapter"))[0]
        slurm.crash(nodes[-1])
        slurm.boot(nodes[-1])
        wait_for((run.workplace.run_folder / "summary.json").exists)
        wait_for(lambda: not queue())
        run.watched, _ = watch.communicate(timeout=LIMIT_S)
    finally:
        watch.kill()
    return run


@pytest.fixture(scope="session")
def ray():
    """A Ray of two nodes with two CPUs each; some tests end them and start others."""
    pytest.importorskip("ray", reason="pip install 'qlora_dist[ray]'")
    if os.geteuid() != 0:
        pytest.skip("a network namespace wants root: run `sudo make cluster-test`")
    STAGING.mkdir(exist_ok=True)
    with RayCluster(dashboard=True, client_port=CLIENT_PORT, private=STAGING, environment=S3) as cluster:
        cluster.start_node(1)
        cluster.start_node(2)
        yield cluster
    shutil.rmtree(STAGING)


@pytest.fixture(scope="session")
def on_ray(ray: RayCluster, here, tmp_path_factory) -> ClusterRun:
    """One run from `ray job submit` to report; once a training has a checkpoint a node is killed, and another comes."""
    run = ClusterRun(make_workplace(tmp_path_factory.mktemp("on_ray")))
    folder = run.workplace.folder
    command = run.workplace.command(*PLAN, f"root={folder / 'runs'}", *ON_RAY, "launcher.ray.address=auto")
    process = ray.start([RAY, "job", "submit", f"--address={ray.dashboard}", "--", *command], cwd=folder)
    wait_for(lambda: checkpoints(run.workplace) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0][-3000:]
    watch = watching(run.workplace)
    try:
        run.look()
        ray.kill_node("n2")
        ray.start_node(3)
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output[-3000:]
        run.watched, _ = watch.communicate(timeout=LIMIT_S)
    finally:
        watch.kill()
    return run
