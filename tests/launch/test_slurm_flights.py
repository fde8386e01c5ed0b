"""Flights on a simulated Slurm, and that what it does when a command has ended is what the text of a job does."""

import itertools
import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("qlora_dist.launch.slurm.script", reason="there is no Slurm launcher")

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.launch.base import Job
from qlora_dist.launch.slurm.script import PATIENCE, sbatch_text
from qlora_dist.launch.slurm.shape import shape_of
from tests.launch.flight.fake_slurm import ending
from tests.launch.flight.slurm_flight import fly_slurm
from tests.launch.test_flights import require_good

REQUEUED = 99
PRELUDE = f"""
sleep() {{ [ "$1" != 60 ] || exit {REQUEUED}; }}  # so long is waited for the end, once a job is requeued
made() {{ [ -e made ]; }}
true & watch=$!
task=7_0 name=adapter logs=$PWD submission=$PWD code=$1 words=$2
"""
ANSWERS = {"squeue": "echo RUNNING", "scontrol": '[ "$*" = "requeue 7_0" ]'}
AWAY = 'echo x >>"$0.asked"; [ $(wc -l <"$0.asked") -gt {times} ] || exit 1\n'
"""What a command does first whose controller gives no answer so many times."""


@pytest.fixture(scope="module")
def endings() -> dict[int, str]:
    """The last part of a job's text, by its number of processes."""
    config, found = LauncherConfig(), {}
    for processes in (1, 2):
        job = Job(name="adapter/a", argv=[], log=Path("a.log"), processes=processes, cores=processes)
        text = sbatch_text(shape_of(job, config), Path("/r/plan.json"), Path("/r/slurm/001"), config, Path("/"))
        found[processes] = text.rpartition("code=$?\n")[2]
    return found


def run_ending(text: str, folder: Path, code: int, lives: int = 1, away: int = 0) -> int:
    """Runs the last part of a job's text in a folder, after a command that ended with this code; returns its own."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, answer in ANSWERS.items():
        (tools / name).write_text("#!/bin/bash\n" + AWAY.format(times=away) + answer + "\n")
        (tools / name).chmod(0o755)
    environment = {"SLURM_RESTART_COUNT": str(lives - 1), "PATH": f"{tools}:/usr/bin:/bin"}
    script = ["bash", "-c", PRELUDE + text, "job", str(code), "w.failed.json"]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, check=False).returncode


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
        returned = run_ending(endings[processes], tmp_path, code, lives)
        again, is_loss = ending(code, told, processes, lives, losses, retries)
        assert (returned == REQUEUED) == again, (told, lives, losses, returned)
        assert len(lost.read_text().splitlines()) == losses + is_loss


def test_what_is_made_is_done_however_its_processes_ended(endings: dict[int, str], tmp_path: Path):
    (tmp_path / "made").touch()
    assert run_ending(endings[2], tmp_path, 137) == 0
    assert not (tmp_path / "adapter.lost").exists()


@pytest.mark.parametrize(("away", "returned"), [(3, REQUEUED), (1000, 75)])
def test_a_controller_that_is_away_when_a_job_ends_is_asked_again(
    endings: dict[int, str], tmp_path: Path, away: int, returned: int
):
    assert run_ending(endings[2], tmp_path, 75, away=away) == returned
    asked = len((tmp_path / "bin" / "squeue.asked").read_text().splitlines())
    assert asked == min(away + 1, PATIENCE)


def test_some_flights_on_slurm():
    require_good(fly_slurm, range(150))


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 5))
def test_flights_on_slurm_by_the_thousand(batch: int):
    require_good(fly_slurm, range(batch * 500, (batch + 1) * 500))
