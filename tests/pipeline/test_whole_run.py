"""The main job, end to end, as one command: what it leaves, and that it does nothing twice."""

import json
import math
import subprocess
import sys
from pathlib import Path

from tests.pipeline.folders import digest, only


def test_one_command_ends_well_and_prints_scores_paths_and_the_command_to_use_it(finished):
    _, code, output = finished
    assert code == 0, output
    certificate = ("Certificate of what was trained", "every tensor learns", "2 of 2")
    for expected in ("bits per byte", "report.html", "summary.json", "qlora_dist.chat", *certificate):
        assert expected in output.replace("bits_per_byte", "bits per byte"), output


def test_the_summary_holds_every_node_and_a_score_for_every_model_domain_and_measure(finished):
    workplace, _, _ = finished
    summary = workplace.summary
    assert summary["state"] == "done"
    assert set(workplace.states().values()) == {"done"}
    assert all(node["key"] and node["seconds"] > 0 for node in summary["nodes"])
    found = {(row["model"], row["domain"], row["metric"]) for row in summary["scores"]}
    models, metrics = ("base", "files-0", "files-1", "merged"), ("bits_per_byte", "completion_loss")
    wanted = {(m, d, k) for m in models for d in ("files", "general") for k in metrics}
    assert wanted <= found
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in summary["scores"])


def test_the_shipped_adapter_loads_in_peft_and_moves_the_logits(finished):
    workplace, _, _ = finished
    import torch
    from peft import AutoPeftModelForCausalLM

    folder = workplace.run_folder / "adapter"
    assert Path(workplace.summary["adapter"]) == folder.resolve()
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            base = model(tokens).logits
    assert (adapted - base).abs().max() > 1e-4


def test_the_command_that_the_run_prints_works(finished):
    workplace, _, _ = finished
    done = subprocess.run(
        workplace.summary["use"].replace("python", sys.executable, 1),
        shell=True,
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_report_is_one_file_that_names_the_command(finished):
    workplace, _, _ = finished
    page = (workplace.run_folder / "report.html").read_text()
    assert "qlora_dist.launch" in page
    assert 'src="http' not in page
    assert '<link rel="stylesheet"' not in page


def test_the_sealed_test_was_read_once_and_that_is_on_record(finished):
    workplace, _, output = finished
    summary = workplace.summary
    assert {row["domain"]: row["before"] for row in summary["sealed"]} == {"files": [], "general": []}
    assert set(summary["sealed"][0]["models"]) == {"files-0", "files-1", "merged"}
    assert "had been read" not in output
    page = (workplace.run_folder / "report.md").read_text()
    assert "The sealed test was read once, for this choice alone." in page
    assert "minus base, paired by document" in output


def test_all_models_were_scored_by_one_job(finished):
    workplace, _, _ = finished
    nodes = [n for n in workplace.summary["nodes"] if n["stage"] == "scores"]
    (log,) = {node["log"] for node in nodes}
    assert Path(log).read_text().count("nodes to make at once") == 1
    assert "4 of 4 nodes to make at once" in Path(log).read_text()


def test_a_broken_line_is_listed_and_the_run_went_on(finished):
    workplace, code, _ = finished
    assert code == 0
    root = workplace.folder / "runs" / "artifacts"
    rejects = [json.loads(line) for p in root.glob("records/files-*/rejects.jsonl") for line in p.open()]
    assert [(Path(r["file"]).name, r["line"]) for r in rejects] == [("corpus.jsonl", 61)]
    assert "JSON" in rejects[0]["reason"]


def test_training_really_lowered_the_loss(finished):
    workplace, _, _ = finished
    for label, curve in workplace.summary["curves"].items():
        assert curve[-1]["loss"] < curve[0]["loss"], label


def test_every_artifact_verifies_and_nothing_half_made_is_left(finished):
    from qlora_dist.artifacts.store import Store

    workplace, _, _ = finished
    root = workplace.folder / "runs" / "artifacts"
    assert not list(root.glob("*/*.partial"))
    folders = [path.parent for path in root.glob("*/*/manifest.json")]
    assert len(folders) == len(workplace.summary["nodes"])
    for folder in folders:
        Store(root).verify(folder.relative_to(root).as_posix())
        assert not list(folder.rglob(".*"))


def test_the_same_command_again_does_nothing_and_says_so(finished):
    workplace, _, _ = finished
    before = digest(workplace.run_folder / "summary.json")
    code, output = workplace.launch()
    assert code == 0
    assert "Nothing to do" in output
    assert digest(workplace.run_folder / "summary.json") == before


def test_plan_only_lists_nodes_with_key_and_state_and_what_changed(finished):
    workplace, _, _ = finished
    code, output = workplace.launch("plan_only=true", "lora.lora_rank=4", COLUMNS="200")
    assert code == 0
    lines = {line.split()[0]: line for line in output.splitlines() if "/" in line.split(" ")[0]}
    assert "cached" in lines["rows/files-0"]
    assert "to run" in lines["adapter/files-0"]
    assert "lora.lora_rank: 16 -> 4" in lines["adapter/files-0"]
    assert all(node["key"] in output for node in workplace.summary["nodes"] if node["stage"] == "rows")


def test_the_same_seed_in_another_folder_gives_the_same_adapter_bytes(finished, workplace):
    first, _, _ = finished
    for name in ("legal", "general"):
        (workplace.folder / name / "corpus.jsonl").write_bytes((first.folder / name / "corpus.jsonl").read_bytes())
    code, output = workplace.launch()
    assert code == 0, output
    for pattern in ("adapter/files-0-*/adapter_model.safetensors", "tiny/tiny-*/model.safetensors"):
        one, other = (only(w.folder / "runs" / "artifacts", pattern) for w in (first, workplace))
        assert digest(one) == digest(other), pattern
