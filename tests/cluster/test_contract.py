"""One contract for every launcher: the same plan gives the same keys and, on a CPU in one layout, the same bytes."""

import json
import re

import pytest

from tests.cluster.plans import ON_RAY, ON_SLURM, PLAN, ClusterRun, contents, logs_of, said_by
from tests.launch.flight.flight import fly_ray
from tests.launch.flight.slurm_flight import fly_slurm
from tests.pipeline.conftest import Workplace

CLUSTERS = [pytest.param(name, marks=pytest.mark.cluster) for name in ("on_slurm", "on_ray")]
OPTIONS = {"on_slurm": ON_SLURM, "on_ray": ON_RAY}


@pytest.fixture
def run(request) -> ClusterRun:
    """A run on the named cluster, in the middle of which a node died."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("run", CLUSTERS, indirect=True)
def test_a_run_goes_from_submit_to_report_whatever_dies(run: ClusterRun):
    assert set(run.workplace.states().values()) == {"done"}
    assert (run.workplace.run_folder / "report.html").exists()
    assert re.search(r"continu\w+ after step", logs_of(run.workplace, "adapter"))


@pytest.mark.parametrize("run", CLUSTERS, indirect=True)
@pytest.mark.parametrize("stage", ["rows", "tiny", "adapter", "winner", "merged", "scores"])
def test_the_result_is_that_of_the_same_plan_on_this_machine(run: ClusterRun, local: Workplace, stage: str):
    there, here = contents(run.workplace.folder / "runs", stage), contents(local.folder / "runs", stage)
    assert there == here
    assert there


@pytest.mark.parametrize("run", CLUSTERS, indirect=True)
def test_status_tells_of_each_node_during_a_run_and_after_it(run: ClusterRun):
    during = {node["node"]: node for node in run.during}
    assert set(during) == set(run.workplace.states())
    trained = [node for name, node in during.items() if name.startswith("adapter/") and node["state"] == "running"]
    assert trained
    assert all(re.fullmatch(r"\d+/\d+", node["step"]) and "on " in node["reason"] for node in trained), trained
    assert during["merged/all"]["state"] == "waiting"
    assert re.search(r"smoke: .*running", run.plain)
    assert run.watched.count("smoke: ") > 1
    last = run.watched.rpartition("smoke: ")[2]
    assert last.startswith(f"{len(during)} done") and "report.html" in last
    after = json.loads(said_by("status", run.workplace.run_folder, "--json"))
    assert after["counts"] == {"done": len(during)}


@pytest.mark.parametrize("run", CLUSTERS, indirect=True)
def test_the_same_command_again_does_nothing(run: ClusterRun, request):
    name = request.node.callspec.params["run"]
    code, output = run.workplace.launch(*PLAN, *OPTIONS[name])
    assert code == 0, output
    assert "Nothing to do" in output


def test_simulated_clusters_give_the_same_too():
    for seed in range(12):
        calm, ray, slurm = fly_ray(seed, num_faults=0), fly_ray(seed, num_faults=5), fly_slurm(seed, num_faults=5)
        assert calm.made
        assert calm.made == ray.made == slurm.made, seed
