"""A sweep as one command: every trial an artifact of its own, one chosen a shard, and nothing trained twice."""

import json
from pathlib import Path

import pytest

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
    assert "r2-lr0.004" in workplace.summary["curves"] or "files-0.r2-lr0.004" in workplace.summary["curves"]
    before = {key: (f / "manifest.json").stat().st_mtime_ns for key, f in adapters(workplace).items()}
    code, output = workplace.launch(*GRID[:1], "sweep.lora_rank=[2,4,8]", *GRID[2:])
    assert code == 0, output
    after = {key: (f / "manifest.json").stat().st_mtime_ns for key, f in adapters(workplace).items()}
    assert len(after) == 6
    assert before.items() <= after.items(), "what was trained stays as it was"
    code, output = workplace.launch(*GRID[:1], "sweep.lora_rank=[2,4,8]", *GRID[2:])
    assert "Nothing to do" in output
