"""A plan on a real Slurm: nodes die, jobs are preempted, settings are wrong; the same bytes as here alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.plans import LIMIT_S, PLAN, contents
from tests.pipeline.conftest import Workplace, make_workplace

SCRIPT = Path(__file__).with_name("slurm-cluster")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="host names of its own want root: run `sudo make cluster-test`"),
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="apt-get install munge slurmctld slurmd slurm-client"),
]
SLURM = ["launcher=slurm", "launcher.slurm.gpus_per_rank=0", "launcher.slurm.cpus_per_rank=1"]
SLURM += ["launcher.slurm.ranks_per_node=1", "launcher.slurm.poll_s=0.5", "launcher.slurm.signal_s=60"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", "--dir", folder, "--nodes", "3", "--cpus", "2"], check=True, stdout=-3)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    del os.environ["SLURM_CONF"]
    subprocess.run([SCRIPT, "stop", "--dir", folder], check=False)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Workplace:
    """Where both runs are made, and the one of this machine, with a thread a process as on the cluster."""
    workplace = make_workplace(tmp_path_factory.mktemp("work"))
    command = workplace.command(*PLAN, f"root={workplace.folder / 'local'}")
    done = subprocess.run(
        ["taskset", "-c", "0", *command], cwd=workplace.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return workplace


def said(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_for(what, seconds: float = LIMIT_S, every: float = 0.2):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen: " + said("squeue", "-r", "-t", "all")
        time.sleep(every)
    return found


def running(stage: str) -> list[tuple[str, str]]:
    """Returns the name of each task of a stage that runs, with its nodes."""
    lines = said("squeue", "-h", "-r", "-t", "running", "-o", "%j|%F_%K|%N").splitlines()
    cells = [line.split("|") for line in lines]
    return [(task, nodes) for name, task, nodes in cells if f":{stage}" in name]


@pytest.fixture(scope="module")
def on_slurm(cluster: Path, here: Workplace) -> Workplace:
    """One run from submit to report, whose launcher is killed once all is submitted.

    A training is preempted by signal once it has a checkpoint, and later a node of a training dies.
    """
    process = here.start(*PLAN, *SLURM)
    wait_for(lambda: here.run_folder.joinpath("slurm", "001", "ids").exists() and running("records"))
    wait_for(lambda: "close_0" in (here.run_folder / "slurm" / "001" / "ids").read_text())
    process.kill()
    process.wait()
    checkpoints = here.folder / "runs" / "artifacts" / "adapter"
    wait_for(lambda: running("adapter") and list(checkpoints.rglob("step-*/state.json")))
    task, _ = running("adapter")[0]
    said("scancel", "--signal=TERM", task)
    log = here.run_folder / "logs"
    wait_for(lambda: any("to be run again" in path.read_text() for path in log.glob("adapter*.log")), 90)
    _, nodes = wait_for(lambda: running("adapter"))[0]
    dead = said("scontrol", "show", "hostnames", nodes).split()[-1]
    said(str(SCRIPT), "crash", "--dir", str(cluster), dead)
    # A node that is back before Slurm misses it keeps its job, which then waits for torchrun's exit barrier.
    wait_for(lambda: "down" in said("sinfo", "-h", "-N", "-n", dead, "-o", "%t"), 90)
    said(str(SCRIPT), "boot", "--dir", str(cluster), dead)
    wait_for((here.run_folder / "summary.json").exists)
    wait_for(lambda: not said("squeue", "-h"), 60)
    return here


def test_a_run_ends_in_its_report_though_its_launcher_a_node_and_a_job_were_ended(on_slurm: Workplace):
    assert set(on_slurm.states().values()) == {"done"}
    assert (on_slurm.run_folder / "report.html").exists()
    logs = "".join(path.read_text() for path in (on_slurm.run_folder / "logs").glob("adapter*.log"))
    assert "life 2" in logs
    assert "after step" in logs


def test_the_result_is_that_of_the_same_plan_on_this_machine(on_slurm: Workplace):
    for stage in ("rows", "tiny", "adapter", "merged", "scores"):
        there, here = contents(on_slurm.folder / "runs", stage), contents(on_slurm.folder / "local", stage)
        assert there == here, stage
        assert there, stage


def test_the_same_command_again_does_nothing(on_slurm: Workplace):
    code, output = on_slurm.launch(*PLAN, *SLURM)
    assert code == 0, output
    assert "Nothing to do" in output


def test_status_tells_of_each_node(on_slurm: Workplace):
    done = subprocess.run(
        [sys.executable, "-m", "qlora_dist.status", on_slurm.run_folder, "--json"], capture_output=True, check=True
    )
    nodes = json.loads(done.stdout)["nodes"]
    assert {node["node"] for node in nodes} == set(on_slurm.states())
    assert {node["state"] for node in nodes} == {"done"}


def test_a_second_launch_goes_on_with_the_jobs_in_the_queue_and_cancel_ends_them(cluster: Path, here: Workplace):
    names = ["name=held", "seed=5", *SLURM, "launcher.slurm.options=[--hold]"]
    process = here.start(*names)
    ids = here.folder / "runs" / "held" / "slurm" / "001" / "ids"
    wait_for(lambda: ids.exists() and "close_0" in ids.read_text(), 90)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The jobs go on" in output
    code, output = here.launch(*names, "lora.lora_rank=2")
    assert code == 1
    assert "of another plan in Slurm's queue" in output
    again = here.start(*names)
    time.sleep(8)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert [path.name for path in ids.parent.parent.iterdir()] == ["001"]
    folder = str(ids.parent.parent.parent)
    assert "waiting" in said_of("status", folder)
    assert "were cancelled" in said_of("cancel", folder)
    assert not said("squeue", "-h")


def said_of(command: str, folder: str) -> str:
    argv = [sys.executable, "-m", f"qlora_dist.{command}", folder]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60).stdout


@pytest.mark.parametrize(
    ("setting", "said_there"),
    [
        ("launcher.slurm.partition=mian", "Did you mean main?"),
        ("launcher.slurm.partition=closed", "a partition that is up"),
        ("launcher.slurm.time=2-00:00:00", "at most 1-00:00:00, the limit of partition main"),
        ("+launcher.timeout_s.adapter=1000000", "launcher.timeout_s.adapter=1000000"),
        ("launcher.slurm.gpus_per_rank=1", "at most 0 GPUs a node"),
        ("launcher.slurm.cpus_per_rank=64", "at most 2 CPUs a node"),
        ("launcher.slurm.constraint=fast", "Look at launcher.slurm.account"),
        ("root=/proc/runs", "Set root= to a folder of yours"),
        ("launcher.slurm.shared_root=/shared", "a folder below launcher.slurm.shared_root"),
    ],
)
def test_wrong_site_settings_are_named_with_the_repair_and_nothing_is_submitted(
    cluster: Path, here: Workplace, setting: str, said_there: str
):
    before = said("squeue", "-h", "-r", "-t", "all")
    code, output = here.launch("name=wrong", "seed=6", *SLURM, setting)
    assert code in (1, 2)
    assert said_there in output, output
    assert "Traceback" not in output
    assert said("squeue", "-h", "-r", "-t", "all") == before


def test_no_sbatch_on_path_is_named(here: Workplace):
    code, output = here.launch("name=wrong", "seed=6", *SLURM, PATH=str(Path(sys.executable).parent))
    assert code == 1
    assert "is not on PATH. Run this on a login node" in output


def test_a_controller_that_is_away_is_named_within_seconds(cluster: Path, here: Workplace):
    said(str(SCRIPT), "stop-controller", "--dir", str(cluster))
    try:
        code, output = here.launch("name=wrong", "seed=6", *SLURM, "launcher.slurm.answer_s=3")
    finally:
        said(str(SCRIPT), "start-controller", "--dir", str(cluster))
    assert code == 1
    assert "Slurm's controller does not answer" in output
