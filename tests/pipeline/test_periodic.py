"""Shards that train together apart, as one command: a worker is killed, the others go on, and the next run ends it."""

import json
import os
import signal

import pytest

from tests.pipeline.waiting import wait_for

PERIODIC = (
    "merge=periodic",
    "merge.every_steps=6",
    "train.epochs=40",
    "train.max_steps=60",
    "train.checkpoint_every_s=0",
)
LOST = ("merge.wait_s=0.5", "launcher.retries=0")


@pytest.mark.slow
def test_a_killed_worker_is_done_without_and_the_next_run_brings_it_back(workplace):
    process = workplace.start(*PERIODIC, *LOST)
    rounds = workplace.folder / "runs" / "artifacts" / "rounds"
    wait_for(lambda: list(rounds.glob("*/round-0001")))
    (owner,) = rounds.glob("*/present/files-1/.owner.json")
    os.kill(json.loads(owner.read_text())["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1, output
    states = workplace.states()
    assert states["worker/files-0"] == "done", output
    assert states["worker/files-1"] != "done"
    log = (workplace.run_folder / "logs" / "worker-files-0.log").read_text()
    assert "the round goes on without files-1" in log
    code, output = workplace.launch(*PERIODIC, *LOST)
    assert code == 0, output
    assert workplace.states()["worker/files-0"] == "cached"
    (merged,) = (n for n in workplace.summary["nodes"] if n["stage"] == "merged")
    told = merged["facts"]["rounds"]
    assert [one["round"] for one in told] == list(range(1, 11))
    assert told[0]["absent"] == told[-1]["absent"] == []
    missed = [one["round"] for one in told if one["absent"] == ["files-1"]]
    (worker,) = (n for n in workplace.summary["nodes"] if n["label"] == "files-1" and n["stage"] == "worker")
    assert missed
    assert worker["facts"]["rounds_missed"] == missed
    assert "absent" in (workplace.run_folder / "report.md").read_text()
