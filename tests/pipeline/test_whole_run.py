"""The main job, end to end, as one command: what it leaves, and that it does nothing twice."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_dist.launch.compose import compose_run
from qlora_dist.pipeline.nodes import make_plan
from tests.unit.export.llama_cpp import LlamaCpp


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


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


@pytest.mark.slow
def test_ctrl_c_ends_the_children_and_the_next_run_goes_on(workplace):
    process = workplace.start(WANDB_MODE="offline")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "running tiny/tiny" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(lines) + rest
    assert "the same command goes on" in rest
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(workplace.folder) not in listed
    code, output = workplace.launch()
    assert code == 0, output
    assert "cached" in workplace.states().values()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_nodes_along_and_the_next_run_goes_on(workplace):
    process = workplace.start()
    for line in process.stdout:
        if "running tiny/tiny" in line:
            break
    process.kill()
    process.wait()
    for _ in range(100):
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if str(workplace.folder) not in listed:
            break
        time.sleep(0.1)
    assert str(workplace.folder) not in listed
    code, output = workplace.launch()
    assert code == 0, output


@pytest.mark.slow
def test_a_second_launch_at_the_same_time_is_refused_by_name(workplace):
    process = workplace.start()
    for line in process.stdout:
        if "running" in line:
            break
    code, output = workplace.launch()
    assert code == 1
    assert f"is being run by process {process.pid}" in output
    assert "name=<other>" in output
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_multirun_shares_what_its_points_have_in_common(workplace):
    code, output = workplace.launch("-m", "lora.lora_rank=2,4", "merge.num_parts=2")
    assert code == 0, output
    root = workplace.folder / "runs"
    assert len(list((root / "artifacts" / "tiny").glob("tiny-*"))) == 1
    assert len(list((root / "artifacts" / "adapter").glob("files-0-*"))) == 2
    assert len(list((root / "artifacts" / "merged_part").glob("all-*"))) == 4
    for rank in (2, 4):
        (folder,) = [p for p in root.glob("smoke-*") if f"lora_rank={rank}" in p.name]
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == 2 * rank
    assert not (workplace.folder / "multirun").exists()
    assert sorted(path.name for path in workplace.folder.iterdir()) == ["general", "legal", "runs"]
    is_what_a_grid_of_its_points_trains(workplace)


def is_what_a_grid_of_its_points_trains(workplace):
    """A grid over the same points finds each adapter finished; and trains the same ones, as lanes, where it doesn't."""
    told = workplace.command(f"root={workplace.folder / 'runs'}", "sweep=grid", "sweep.lora_rank=[2,4]", "name=grid")
    plan = make_plan(compose_run(told[3:]))
    trials = [node for node in plan.nodes if node.stage == "adapter"]
    assert [node.label for node in trials] == [f"files-{shard}.r{rank}" for shard in (0, 1) for rank in (2, 4)]
    assert len({node.group for node in trials}) == 2, "a job a shard"
    files = {n.label: plan.store.folder(n.id) / "adapter_model.safetensors" for n in trials if n.subject == "files-0"}
    alone = {label: load_file(path) for label, path in files.items()}
    for path in files.values():
        shutil.rmtree(path.parent)
    names = [f"adapter/{label}" for label in files]
    command = [sys.executable, "-m", "qlora_dist.pipeline", str(plan.write()), *names]
    subprocess.run(command, check=True, cwd=workplace.folder, capture_output=True)
    for label, path in files.items():
        together = load_file(path)
        assert together.keys() == alone[label].keys()
        for name, value in together.items():
            assert (value - alone[label][name]).norm() <= 1e-5 * max(1.0, float(alone[label][name].norm())), label


@pytest.mark.slow
@pytest.mark.parametrize("override", ["model.quantization=none", "train.method=full"])
def test_sixteen_bit_lora_and_full_fine_tuning_are_the_same_recipe_with_one_key_changed(workplace, override):
    code, output = workplace.launch(override)
    assert code == 0, output
    models = {row["model"] for row in workplace.summary["scores"]}
    assert {"base", "files-0", "files-1"} <= models


@pytest.mark.slow
def test_the_referee_ships_the_candidate_that_gained_most_on_development_data(workplace):
    code, output = workplace.launch("merge=referee", "merge.scales=[1.0,2.0]", "merge.max_forgetting=10", "export=gguf")
    assert code == 0, output
    chosen = only(workplace.folder / "runs" / "artifacts", "chosen/all-*")
    verdict = json.loads((chosen / "referee.json").read_text())
    names = {standing["candidate"] for standing in verdict["standings"]}
    assert names == {"files-0", "files-1", "concat x1", "concat x2"}
    best = max(verdict["standings"], key=lambda standing: standing["gain"])
    assert verdict["chosen"] == best["candidate"]
    assert not (chosen / "candidates").exists()
    shipped = workplace.run_folder / "adapter" / "adapter_model.safetensors"
    assert digest(shipped) == digest(chosen / "adapter_model.safetensors")
    assert {row["model"] for row in workplace.summary["scores"]} == {"base", "merged"}
    assert_llama_cpp_reads(only(workplace.folder / "runs" / "artifacts", "export/merged-*"), shipped.parent)


def assert_llama_cpp_reads(export: Path, adapter: Path) -> None:
    """Checks that the embedded base, merged, splits text and goes on with it in llama.cpp as it does here."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    theirs, tokens = LlamaCpp(export / "model.gguf"), tokenizer("notice subject to the parties").input_ids
    assert theirs.tokens("notice subject to the parties") == tokens
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    found = model.generate(torch.tensor([tokens]), do_sample=False, min_new_tokens=12, max_new_tokens=12)
    assert theirs.greedy(tokens) == found[0, len(tokens) :].tolist()


@pytest.mark.slow
def test_two_processes_train_an_adapter_and_the_run_ends_well(workplace):
    code, output = workplace.launch("strategy=ddp", "strategy.world_size=2", "train.micro_batch_tokens=512")
    assert code == 0, output
    node = next(n for n in workplace.summary["nodes"] if n["stage"] == "adapter")
    assert node["facts"]["world_size"] == 2
    assert node["facts"]["certificate"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_a_base_from_a_folder_goes_the_same_way(workplace, architecture):
    from qlora_dist.testing import save_tiny_model

    base = save_tiny_model(workplace.folder / f"tiny-{architecture}", architecture)
    code, output = workplace.launch(f"model.path={base}", "domain.files.num_shards=1", "train.row_tokens=64")
    assert code == 0, output
    node = next(n for n in workplace.summary["nodes"] if n["stage"] == "base")
    assert architecture in node["facts"]["architecture"].lower()
    assert not [n for n in workplace.summary["nodes"] if n["stage"] == "tiny"]
