"""A sweep as one command: every trial an artifact of its own, one chosen a shard, and nothing trained twice."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_dist.adapters.command import main as merge_main
from tests.pipeline.waiting import listed, wait_for

GRID = ("sweep=grid", "sweep.lora_rank=[2,4]", "sweep.learning_rate=[1e-3,4e-3]", "domain.files.num_shards=1")


def adapters(workplace) -> dict[str, Path]:
    """Returns the folder of each finished adapter, by its key."""
    folders = (workplace.folder / "runs" / "artifacts" / "adapter").glob("files-0-*")
    return {json.loads((f / "manifest.json").read_text())["key"]: f for f in folders}


@pytest.mark.slow
def test_a_grid_trains_each_trial_once_chooses_one_and_a_rank_more_trains_that_one_alone(workplace):
    code, output = workplace.launch(*GRID)
    assert code == 0, output
    sweep = workplace.summary["sweep"]
    assert len(adapters(workplace)) == 4
    names = [f"r{rank}-lr{rate}" for rank in (2, 4) for rate in ("0.001", "0.004")]
    assert [row["label"] for row in sweep["trials"]] == names
    (shard,) = sweep["shards"]
    assert shard["winner"] in names
    assert sweep["tokens"] == 4 * 4 * 1024, "four trials, four steps each"
    winner = next((workplace.folder / "runs" / "artifacts" / "winner").glob("files-0-*"))
    made = json.loads((winner / "adapter_config.json").read_text())
    assert made["r"] == int(shard["winner"][1])
    report = (workplace.run_folder / "report.md").read_text()
    assert shard["winner"] in report
    assert merge_main([str(workplace.run_folder), "--out", str(workplace.folder / "merged")]) == 0
    told = json.loads((workplace.folder / "merged" / "merge.json").read_text())
    assert [(p["label"], p["lora_rank"]) for p in told["parts"]] == [("files-0", made["r"])], "the chosen trial alone"
    assert "r2-lr0.004" in workplace.summary["curves"] or "files-0.r2-lr0.004" in workplace.summary["curves"]
    before = {key: (f / "manifest.json").stat().st_mtime_ns for key, f in adapters(workplace).items()}
    code, output = workplace.launch(*GRID[:1], "sweep.lora_rank=[2,4,8]", *GRID[2:])
    assert code == 0, output
    after = {key: (f / "manifest.json").stat().st_mtime_ns for key, f in adapters(workplace).items()}
    assert len(after) == 6
    assert before.items() <= after.items(), "what was trained stays as it was"
    code, output = workplace.launch(*GRID[:1], "sweep.lora_rank=[2,4,8]", *GRID[2:])
    assert "Nothing to do" in output


@pytest.mark.slow
def test_a_trial_that_is_lost_costs_the_shard_no_winner(workplace):
    told = ("sweep=grid", "sweep.lora_alpha=[16,1e38]", "domain.files.num_shards=1", "evaluate.max_answers=0")
    code, output = workplace.launch(*told)
    assert code == 0, output
    assert "1 of 2 trials were lost. a1e+38: Step 1: " in " ".join(output.split())
    assert [(row["label"], row["state"]) for row in workplace.summary["sweep"]["trials"]] == [
        ("a16", "finished"),
        ("a1e+38", "lost"),
    ]
    assert workplace.summary["adapter"]
    _, output = workplace.launch(*told)
    assert "Nothing to do" in output, "a trial that is known to be lost is not trained again"


HALVING = ("sweep=halving", "sweep.lora_rank=[2,4]", "sweep.learning_rate=[1e-4,1e-3,4e-3]", "sweep.max_forgetting=9")
FEW = ("domain.files.num_shards=1", "train.max_steps=9", "evaluate.max_answers=0")


@pytest.mark.slow
def test_a_halving_killed_and_run_again_has_the_same_winner_and_adapters_and_trains_nothing_twice(workplace):
    store = workplace.folder / "runs" / "artifacts"
    code, output = workplace.launch(*HALVING, *FEW)
    assert code == 0, output
    assert "is chosen" in output
    whole = workplace.summary["sweep"]
    assert whole["tokens"] < 0.5 * whole["grid_tokens"]
    adapter = next(iter(adapters(workplace).values())) / "adapter_model.safetensors"
    key, expected = adapter.parent.name, adapter.read_bytes()
    for stage in ("halved", "rung", "adapter", "merged", "scores"):
        shutil.rmtree(store / stage)
    process = workplace.start(*HALVING, *FEW, "train.checkpoint_every_s=0")
    wait_for(lambda: len(list(store.glob("rung/*/manifest.json"))) >= 6)
    process.kill()
    process.wait()
    wait_for(lambda: str(workplace.folder) not in listed())
    kept = {path: path.stat().st_mtime_ns for path in store.glob("rung/*/manifest.json")}
    assert kept
    code, output = workplace.launch(*HALVING, *FEW, "train.checkpoint_every_s=0")
    assert code == 0, output
    assert workplace.summary["sweep"] == whole
    assert (store / "adapter" / key / "adapter_model.safetensors").read_bytes() == expected
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items()), "no rung is made again"
