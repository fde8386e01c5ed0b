"""What only a real Ray shows: trainings that grow with it, no shared folder, and addresses where there is none."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cluster.plans import CLIENT_PORT, LIMIT_S, LONG, ON_RAY, PLAN, STAGING, TWO_RANKS, ClusterRun, wait_for
from tests.cluster.ray_cluster import RayCluster
from tests.pipeline.conftest import Workplace, make_workplace

pytestmark = pytest.mark.cluster
pytest.importorskip("ray", reason="pip install 'qlora_dist[ray]'")

LONGER = [*LONG, "train.epochs=400", "train.max_steps=400"]
SERVE_S3 = """
import s3fs, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 5555, verbose=False)
server.start()
s3fs.S3FileSystem().mkdir("bucket")
threading.Event().wait()
"""


@pytest.fixture
def s3(ray: RayCluster):
    """A local S3 in the cluster's network."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # a pipe that nobody reads would block it
    server = subprocess.Popen(ray.command([sys.executable, "-c", SERVE_S3]), env=ray.environment, **quiet)
    yield "s3://bucket/runs"
    server.kill()
    server.wait()


def test_without_a_shared_folder_a_training_takes_the_processes_that_there_are_and_then_more(
    ray: RayCluster, s3: str, tmp_path: Path
):
    """Through a client. One node of one CPU is there for two processes; the second comes while they train."""
    for name in ray.nodes[1:]:
        ray.kill_node(name)
    first = ray.start_node(4, num_cpus=1)
    workplace = make_workplace(tmp_path)
    recipe = [*TWO_RANKS, *LONGER, "domain.files.num_shards=1", f"root={s3}", f"staging={STAGING}"]
    elastic = ["launcher.ray.min_workers=1", "launcher.ray.max_workers=2", "launcher.ray.wait_s=3"]
    address = f"launcher.ray.address=ray://127.0.0.1:{CLIENT_PORT}"
    run = ray.start(workplace.command(*recipe, *ON_RAY, address, *elastic), cwd=tmp_path)
    wait_for(lambda: list(ray.private_of(first).rglob("step-*/state.json")) or run.poll() is not None)
    ray.start_node(5, num_cpus=1)
    output, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, output[-3000:]
    assert f"kept at  {s3}/smoke" in output
    [summary] = STAGING.rglob("summary.json")
    adapter = next(node for node in json.loads(summary.read_text())["nodes"] if node["stage"] == "adapter")
    manifest = json.loads((Path(adapter["folder"]) / "manifest.json").read_text())
    assert manifest["execution"]["strategy"]["world_size"] == 2, "as planned"
    assert manifest["facts"]["resumed_after_step"] > 0, "by one process"
    assert manifest["made"]["processes"] == 2, "by both"
    measure_again(ray, workplace, *recipe, f"launcher.ray.address={ray.address}")


def test_without_an_address_a_run_has_a_cluster_of_its_own(on_ray: ClusterRun, ray: RayCluster):
    with TemporaryDirectory(prefix="rl", dir="/tmp") as own:  # short, since paths of sockets end at 107 characters
        measure_again(ray, on_ray.workplace, *PLAN, RAY_TMPDIR=own)


def measure_again(ray: RayCluster, workplace: Workplace, *recipe: str, **environment: str) -> None:
    """Has the models of a run measured on fewer rows, as a run of its own: all else is there."""
    again = workplace.command(*recipe, "evaluate.max_rows=7", "name=again", *ON_RAY)
    run = ray.start(again, cwd=workplace.folder, **environment)
    output, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, output[-3000:]
    found = re.search(r"(\d+) of (\d+) nodes to run", output)
    assert found and 0 < int(found[1]) < int(found[2])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_no_ray_at_the_address_is_one_error_that_names_the_repair(tmp_path: Path, address: str):
    workplace = make_workplace(tmp_path)
    started = time.monotonic()
    code, output = workplace.launch("launcher=ray", f"launcher.ray.address={address}", RAY_TMPDIR=str(tmp_path))
    assert code == 1
    assert "no Ray answers" in output and "ray start --head" in output
    assert "Traceback" not in output
    assert not (workplace.run_folder / "plan.json").exists(), "nothing was submitted"
    assert time.monotonic() - started < 60
