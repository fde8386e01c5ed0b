"""Flights on a simulated Slurm, and that what it does when a command has ended is what the text of a job does."""

import itertools
import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("qlora_dist.launch.slurm.script", reason="there is no Slurm launcher")

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.launch.base import Job
from qlora_dist.launch.slurm.script import sbatch_text
from qlora_dist.launch.slurm.shape import shape_of
from tests.launch.flight.fake_slurm import ending
from tests.launch.flight.slurm_flight import fly_slurm
from tests.launch.test_flights import require_good

REQUEUED = 99
PRELUDE = f"""
squeue() {{ echo RUNNING; }}
scontrol() {{ exit {REQUEUED}; }}
made() {{ [ -e made ]; }}
sleep 0 & watch=$!
task=7_0 name=adapter logs=$PWD submission=$PWD code=$1 words=$2
"""


@pytest.fixture(scope="module")
def endings() -> dict[int, str]:
    """The last part of a job's text, by its number of processes."""
    config, found = LauncherConfig(), {}
    for processes in (1, 2):
        job = Job(name="adapter/a", argv=[], log=Path("a.log"), processes=processes, cores=processes)
        text = sbatch_text(shape_of(job, config), Path("/r/plan.json"), Path("/r/slurm/001"), config, Path("/"))
        found[processes] = text.rpartition("code=$?\n")[2]
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("code", [0, 1, 75, 137])
def test_the_text_decides_as_the_simulation_does(endings: dict[int, str], tmp_path: Path, processes: int, code: int):
    retries = LauncherConfig().retries
    for told, lives, losses in itertools.product(([], [75], [76], [1]), (1, 101), (0, retries)):
        word, lost = tmp_path / "w.failed.json", tmp_path / "adapter.lost"
        word.unlink(missing_ok=True)
        if told:
            word.write_text(json.dumps({"exit_code": told[0]}, indent=2))
        lost.write_text("before\n" * losses)
        environment = {"SLURM_RESTART_COUNT": str(lives - 1), "PATH": "/usr/bin:/bin"}
        script = ["bash", "-c", PRELUDE + endings[processes], "job", str(code), word.name]
        done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, check=False)
        again, is_loss = ending(code, told, processes, lives, losses, retries)
        assert (done.returncode == REQUEUED) == again, (told, lives, losses, done)
        assert len(lost.read_text().splitlines()) == losses + is_loss


def test_what_is_made_is_done_however_its_processes_ended(endings: dict[int, str], tmp_path: Path):
    (tmp_path / "made").touch()
    script = ["bash", "-c", PRELUDE + endings[2], "job", "137", "w.failed.json"]
    assert subprocess.run(script, cwd=tmp_path, check=False).returncode == 0
    assert not (tmp_path / "adapter.lost").exists()


def test_some_flights_on_slurm():
    require_good(fly_slurm, range(150))


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 5))
def test_flights_on_slurm_by_the_thousand(batch: int):
    require_good(fly_slurm, range(batch * 500, (batch + 1) * 500))
