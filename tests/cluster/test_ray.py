"""A plan on a real Ray: several raylets, a node that dies in the middle, the same bytes as on this machine alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.plans import LIMIT_S, LONG, PLAN, TWO_RANKS, contents
from tests.cluster.ray_cluster import RayCluster
from tests.pipeline.conftest import Workplace, make_workplace

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace wants root: run `sudo make cluster-test`"),
]
pytest.importorskip("ray", reason="pip install 'qlora_dist[ray]'")

CLIENT_PORT = 10001
STAGING = Path("/tmp/qlora-dist-cluster-test")
"""Each node sees a folder of its own here, as machines do that share none."""
S3 = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:5555",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
SERVE_S3 = """
import s3fs, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 5555, verbose=False)
server.start()
s3fs.S3FileSystem().mkdir("bucket")
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def cluster():
    STAGING.mkdir(exist_ok=True)
    settings = {"num_cpus": 1, "dashboard": True, "client_port": CLIENT_PORT}
    with RayCluster(**settings, private=STAGING, environment=S3) as cluster:
        cluster.start_node(1)
        cluster.start_node(2)
        yield cluster


@pytest.fixture(scope="module")
def on_ray(cluster: RayCluster, tmp_path_factory) -> Workplace:
    """One run from `ray job submit` to report; once a training has a checkpoint a node is killed, and another comes."""
    workplace = make_workplace(tmp_path_factory.mktemp("ray"))
    command = workplace.command(*PLAN, f"root={workplace.folder / 'runs'}", "launcher=ray", "launcher.ray.address=auto")
    submit = ["ray", "job", "submit", f"--address={cluster.dashboard}", "--"]
    run = cluster.start([*submit, *command], cwd=workplace.folder)
    wait_for_checkpoint(workplace, run)
    cluster.kill_node("n2")
    cluster.start_node(3)
    output, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, output[-3000:]
    assert "nodes to run" in output
    return workplace


def wait_for_checkpoint(workplace: Workplace, run: subprocess.Popen[str]) -> None:
    """Waits until some training has written one."""
    end = time.monotonic() + LIMIT_S
    while not list((workplace.folder / "runs" / "artifacts" / "adapter").rglob("step-*/state.json")):
        assert run.poll() is None and time.monotonic() < end, run.communicate()[0][-3000:]
        time.sleep(0.1)


def test_a_run_goes_from_submit_to_report_though_a_node_dies(on_ray: Workplace):
    assert set(on_ray.states().values()) == {"done"}
    assert (on_ray.run_folder / "report.html").exists()
    logs = [path.read_text() for path in (on_ray.run_folder / "logs").glob("adapter*.log")]
    assert any(re.search(r"continu\w+ after step", log) for log in logs)


def test_the_result_is_that_of_the_same_plan_on_this_machine(on_ray: Workplace):
    code, output = on_ray.launch(*PLAN, f"root={on_ray.folder / 'local'}")
    assert code == 0, output[-3000:]
    for name in ("adapter", "merged", "scores", "rows"):
        there, here = contents(on_ray.folder / "runs", name), contents(on_ray.folder / "local", name)
        assert there == here
        assert there


@pytest.fixture
def s3(cluster: RayCluster):
    """A local S3 in the cluster's network."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # a pipe that nobody reads would block it
    server = subprocess.Popen(cluster.command([sys.executable, "-c", SERVE_S3]), env=cluster.environment, **quiet)
    yield "s3://bucket/runs"
    server.kill()
    server.wait()


def test_without_a_shared_folder_a_training_takes_the_processes_that_there_are(
    cluster: RayCluster, s3: str, tmp_path: Path
):
    """Through a client, with one node of one CPU: the step is made of twice as many micro-steps."""
    for name in cluster.nodes[1:]:
        cluster.kill_node(name)
    cluster.start_node(4)
    workplace = make_workplace(tmp_path)
    recipe = [*TWO_RANKS, *LONG, "domain.files.num_shards=1", f"root={s3}", f"staging={STAGING}"]
    elastic = ["launcher.ray.min_workers=1", "launcher.ray.max_workers=2", "launcher.ray.wait_s=3"]
    address = f"launcher.ray.address=ray://127.0.0.1:{CLIENT_PORT}"
    run = cluster.start(workplace.command(*recipe, "launcher=ray", address, *elastic), cwd=tmp_path)
    output, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, output[-3000:]
    assert f"kept at  {s3}/smoke" in output
    [summary] = STAGING.rglob("summary.json")
    adapter = next(node for node in json.loads(summary.read_text())["nodes"] if node["stage"] == "adapter")
    manifest = json.loads((Path(adapter["folder"]) / "manifest.json").read_text())
    assert manifest["execution"]["strategy"]["world_size"] == 2, "as planned"
    assert manifest["made"]["processes"] == 1, "as it was"
    shutil.rmtree(STAGING)


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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-x", "-q"]))
