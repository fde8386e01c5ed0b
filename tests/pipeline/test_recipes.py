"""The main job with another recipe: several points at once, other bases, storage, methods and processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_dist.launch.compose import compose_run
from qlora_dist.pipeline.nodes import make_plan
from tests.pipeline.folders import digest, only
from tests.unit.export.llama_cpp import LlamaCpp


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
    done = subprocess.run(command, check=False, cwd=workplace.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
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
