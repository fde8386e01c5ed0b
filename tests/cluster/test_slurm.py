"""What only a real Slurm shows: a queue that is gone on with, and wrong settings that are refused by the site."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.plans import LIMIT_S, ON_SLURM, ClusterRun, logs_of, said_by, wait_for
from tests.cluster.slurm_cluster import SlurmCluster, queue, said
from tests.pipeline.conftest import Workplace, make_workplace

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("queue"))


def test_a_preempted_job_and_one_whose_node_died_were_requeued(on_slurm: ClusterRun):
    logs = logs_of(on_slurm.workplace, "adapter")
    assert logs.count("to be run again") == 2
    assert "life 2" in logs


def test_a_second_launch_goes_on_with_the_jobs_in_the_queue_and_cancel_ends_them(
    slurm: SlurmCluster, workplace: Workplace
):
    names = ["name=held", "seed=5", *ON_SLURM, "launcher.slurm.options=[--hold]"]
    process = workplace.start(*names)
    ids = workplace.folder / "runs" / "held" / "slurm" / "001" / "ids"
    wait_for(lambda: ids.exists() and "close_0" in ids.read_text())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "The jobs go on" in output
    code, output = workplace.launch(*names, "lora.lora_rank=2")
    assert code == 1
    assert "of another plan in Slurm's queue" in output
    again = workplace.start(*names)
    wait_for(lambda: "nodes to run" in again.stdout.readline())
    again.send_signal(signal.SIGINT)
    output, _ = again.communicate(timeout=LIMIT_S)
    assert "The jobs go on" in output
    assert [path.name for path in ids.parent.parent.iterdir()] == ["001"]
    folder = str(ids.parent.parent.parent)
    assert "waiting" in said_by("status", folder)
    assert "were cancelled" in said_by("cancel", folder)
    assert not queue()
    told = said_by("status", folder)
    assert " cancelled " in told
    if slurm.remembers:
        jobs = {line.split()[1] for line in ids.read_text().splitlines()}
        wait_for(lambda: jobs <= in_accounting("CANCELLED", jobs))  # the controller tells it by and by
        slurm.forget()
        assert said_by("status", folder) == told


def in_accounting(state: str, jobs: set[str]) -> set[str]:
    """Returns which jobs the site's accounting knows to be in a state."""
    asked = ["--allocations", f"--jobs={','.join(sorted(jobs))}", "--format=JobID,State"]
    records = said("sacct", "--noheader", "--parsable2", *asked).splitlines()
    return {record.split("_")[0].split("|")[0] for record in records if record.split("|")[1].startswith(state)}


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
    slurm: SlurmCluster, workplace: Workplace, setting: str, said_there: str
):
    before = said("squeue", "-h", "-r", "-t", "all")
    code, output = workplace.launch("name=wrong", "seed=6", *ON_SLURM, setting)
    assert code in (1, 2)
    assert said_there in output, output
    assert "Traceback" not in output
    assert said("squeue", "-h", "-r", "-t", "all") == before


def test_nodes_that_do_not_answer_are_waited_for_not_refused(slurm: SlurmCluster, workplace: Workplace):
    """Where no node answers, as after a controller's start, `sbatch --test-only` calls any job impossible."""
    for node in ("n1", "n2", "n3"):
        slurm.crash(node)
    slurm.forget()
    try:
        process = workplace.start("name=away", "seed=7", *ON_SLURM, "launcher.slurm.options=[--hold]")
        ids = workplace.folder / "runs" / "away" / "slurm" / "001" / "ids"
        wait_for(lambda: process.poll() is not None or (ids.exists() and "close_0" in ids.read_text()))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT_S)
        assert "3 nodes of partition main are down or don't answer" in output, output
        assert "The jobs go on" in output
        assert "were cancelled" in said_by("cancel", str(ids.parent.parent.parent))
    finally:
        for node in ("n1", "n2", "n3"):
            slurm.boot(node)
        wait_for(lambda: said("sinfo", "-h", "-p", "main", "-o", "%D|%t") == "3|idle\n")


def test_no_sbatch_on_path_is_named(slurm: SlurmCluster, workplace: Workplace):
    code, output = workplace.launch("name=wrong", "seed=6", *ON_SLURM, PATH=str(Path(sys.executable).parent))
    assert code == 1
    assert "is not on PATH. Run this on a login node" in output


def test_a_controller_that_is_away_is_named_within_seconds(slurm: SlurmCluster, workplace: Workplace):
    slurm.stop_controller()
    try:
        code, output = workplace.launch("name=wrong", "seed=6", *ON_SLURM, "launcher.slurm.answer_s=3")
    finally:
        slurm.start_controller()
    assert code == 1
    assert "Slurm's controller does not answer" in output


def test_the_setup_script_has_a_node_try_the_environment_and_says_what_to_run(slurm: SlurmCluster, tmp_path: Path):
    (tmp_path / "qlora_dist-venv").symlink_to(sys.prefix)
    done = set_up(tmp_path, "short")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^n1: \d+ cores, 0 GPUs, torch", done.stdout, re.MULTILINE)
    assert "launcher.slurm.partition=short launcher.slurm.gpus_per_rank=0" in done.stdout
    for partition, said_there in (("closed", "closed is down"), ("mian", "mian is not there")):
        done = set_up(tmp_path, partition)
        assert done.returncode == 1
        assert f"partition {said_there}; name one that is up" in done.stdout
    (tmp_path / "qlora_dist-venv").unlink()
    (tmp_path / "qlora_dist-venv" / "bin").mkdir(parents=True)
    (tmp_path / "qlora_dist-venv" / "bin" / "python").symlink_to("/bin/false")
    done = set_up(tmp_path, "short")
    assert done.returncode == 1
    assert "Do all nodes see" in done.stdout


def set_up(folder: Path, partition: str) -> "subprocess.CompletedProcess[str]":
    script = Path(__file__).parents[2] / "slurm" / "setup.sh"
    return subprocess.run(
        ["bash", script, folder, partition], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
