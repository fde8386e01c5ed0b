"""`strategy=single`: the standard Hugging Face workflow makes PEFT folders, the same twice."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import AdapterConfig, BaseConfig
from qlora_dist.config.train import LoraConfig, Method, Optimizer, Schedule, StrategyName, TrainConfig
from qlora_dist.errors import ConfigError, TrainError
from qlora_dist.model.adapter import read_provenance
from qlora_dist.model.base import load_model, open_base, prepare_base
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train import huggingface, train_adapter
from qlora_dist.train.budget import plan_budget


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    top = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(top / "model")
    (top / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, top / "base")
    rows, held_out = save_rows(top / "rows", 24), save_rows(top / "validation", 8, seed=1)
    return {"base": top / "base", "tokenizer": model, "rows": rows, "validation": held_out}


def config(seed=3, method=Method.lora, quantization=Quantization.nf4, **train):
    recipe = {"row_tokens": 32, "tokens_per_step": 256, "micro_batch_tokens": 128, "learning_rate": 0.01} | train
    return AdapterConfig(
        model=ModelConfig(quantization=quantization, compute_dtype=Dtype.bfloat16),
        lora=LoraConfig(lora_rank=4),
        train=TrainConfig(method=method, **recipe),
        seed=seed,
    )


def train(config, inputs, out):
    out.mkdir(exist_ok=True)
    return train_adapter(config, inputs, out)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_adapter_is_a_peft_folder_that_lowers_the_loss(inputs, tmp_path):
    facts = train(config(epochs=4), inputs, tmp_path / "out")
    files = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "qlora_dist.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == list(range(1, facts["num_steps"] + 1))
    assert read_provenance(tmp_path / "out").validation_loss == facts["validation_loss"]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s"} <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    model = PeftModel.from_pretrained(load_model(open_base(inputs["base"]), ModelConfig()), str(tmp_path / "out"))
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_same_seed_gives_the_same_bytes_in_another_process(inputs, tmp_path):
    script = (
        "import sys, pickle, pathlib\n"
        "from qlora_dist.train import train_adapter\n"
        "config, inputs, out = pickle.loads(sys.stdin.buffer.read())\n"
        "train_adapter(config, inputs, out)\n"
    )
    import pickle

    written = []
    for name, hash_seed in (("a", "1"), ("b", "2")):
        out = tmp_path / name
        out.mkdir()
        subprocess.run(
            [sys.executable, "-c", script],
            input=pickle.dumps((config(), inputs, out)),
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        written.append({p.name: p.read_bytes() for p in out.iterdir() if p.name != "metrics.jsonl"})
    assert written[0] == written[1]
    other = train(config(seed=4), inputs, tmp_path / "c")
    assert other["num_steps"] == 3
    assert (tmp_path / "c" / "adapter_model.safetensors").read_bytes() != written[0]["adapter_model.safetensors"]


@pytest.mark.parametrize("quantization", list(Quantization))
def test_quantization_is_one_key(quantization, inputs, tmp_path):
    facts = train(config(quantization=quantization), inputs, tmp_path / "out")
    assert math.isfinite(facts["validation_loss"])
    assert json.loads((tmp_path / "out" / "qlora_dist.json").read_text())["quantization"] == quantization.name


def test_full_fine_tuning_is_one_key_and_leaves_a_model_folder(inputs, tmp_path):
    facts = train(config(method=Method.full), inputs, tmp_path / "out")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(inputs["tokenizer"])
    assert facts["num_trainable"] == tuned.num_parameters()
    assert all(not torch.equal(a, b) for a, b in zip(tuned.parameters(), plain.parameters(), strict=True))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_accumulation_does_not_change_the_step(inputs, tmp_path):
    first = {}
    for micro in (32, 64, 256):
        train(config(micro_batch_tokens=micro, max_steps=1), inputs, tmp_path / str(micro))
        first[micro] = metrics(tmp_path / str(micro))[0]["grad_norm"]
    assert first[32] == pytest.approx(first[256], rel=2e-2)
    assert first[64] == pytest.approx(first[256], rel=2e-2)


def test_loss_that_is_not_finite_stops_the_training(inputs, tmp_path):
    with pytest.raises(TrainError, match=r"Step \d+: (loss|grad_norm) is (nan|inf)"):
        train(
            config(method=Method.full, learning_rate=1.0, epochs=20, max_grad_norm=1e30),
            broken(inputs, tmp_path),
            tmp_path / "out",
        )


def broken(inputs, tmp_path):
    """A base whose weights overflow."""
    model = AutoModelForCausalLM.from_pretrained(inputs["tokenizer"])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(tmp_path / "model"))), {}, tmp_path / "base")
    return inputs | {"base": tmp_path / "base"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base of matrices that are large enough for 8 bits: bitsandbytes holds smaller ones' moments in 32."""
    top = tmp_path_factory.mktemp("wide")
    model = save_tiny_model(top / "model", hidden_size=64)
    (top / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, top / "base")
    return {"base": top / "base", "tokenizer": model, "rows": save_rows(top / "rows", 24)}


def test_moments_in_eight_bits_are_held_so_and_lead_the_same_way(wide, tmp_path, monkeypatch):
    made = []
    plain = huggingface.optimizer_and_schedule
    monkeypatch.setattr(huggingface, "optimizer_and_schedule", lambda *args: made.append(plain(*args)) or made[-1])
    losses = {}
    for kind in (Optimizer.adamw, Optimizer.adamw_8bit):
        told = config(method=Method.full, epochs=8, learning_rate=2e-3, optimizer=kind)
        train(told, wide, tmp_path / kind.name)
        losses[kind] = [line["loss"] for line in metrics(tmp_path / kind.name)]
    states = [list(optimizer.state.values()) for optimizer, _ in made]
    assert all(state["exp_avg"].dtype is torch.float32 for state in states[0])
    assert {state["state1"].dtype for state in states[1] if state["state1"].numel() >= 4096} == {torch.uint8}
    assert losses[Optimizer.adamw_8bit] == pytest.approx(losses[Optimizer.adamw], rel=0.02)
    assert losses[Optimizer.adamw_8bit] != losses[Optimizer.adamw]
    assert losses[Optimizer.adamw_8bit][-1] < 0.9 * losses[Optimizer.adamw_8bit][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="pages work on a GPU")
def test_pages_without_a_gpu_are_refused_by_name(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"train.optimizer=paged_adamw_8bit: expected adamw_8bit without a GPU"):
        train(config(optimizer=Optimizer.paged_adamw_8bit), inputs, tmp_path / "out")


def test_a_process_that_sees_several_gpus_takes_one(inputs, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    seen = config()
    plan = plan_budget(seen.train, 24, seen.seed)
    plain = TrainingArguments.__post_init__
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: (plain(self), setattr(self, "_n_gpu", 4)))
    arguments = huggingface.training_arguments(seen, plan, tmp_path)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == seen.train.micro_batch_tokens // seen.train.row_tokens


def test_a_base_has_no_dropout_of_its_own(inputs, tmp_path):
    model = save_tiny_model(tmp_path / "model", attention_dropout=0.5)
    (tmp_path / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, tmp_path / "base")
    for name, told in (("plain", inputs), ("dropping", inputs | {"base": tmp_path / "base"})):
        train(config(max_steps=2), told, tmp_path / name)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "dropping")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_rows_beyond_the_bases_positions_are_refused(strategy, inputs, tmp_path):
    told = config(row_tokens=1024, tokens_per_step=1024, micro_batch_tokens=1024)
    told.strategy.name = StrategyName[strategy]
    rows = save_rows(tmp_path / "rows", 2, 1024)
    with pytest.raises(ConfigError, match=r"train.row_tokens=1024: expected at most 512.*Set train.row_tokens=512"):
        train(told, inputs | {"rows": rows}, tmp_path / "out")


def test_rows_of_another_length_are_refused(inputs, tmp_path):
    with pytest.raises(TrainError, match=r"Set train.row_tokens=32"):
        train(config(row_tokens=64), inputs, tmp_path / "out")


def test_rows_of_another_tokenizer_are_refused(inputs, tmp_path):
    rows = save_rows(tmp_path / "rows", vocab_size=1000)
    with pytest.raises(TrainError, match=r"1000 tokens"):
        train(config(), inputs | {"rows": rows}, tmp_path / "out")


def test_rows_without_a_target_are_refused(inputs, tmp_path):
    import numpy as np

    rows = save_rows(tmp_path / "rows")
    np.save(rows / "trained.npy", np.zeros_like(np.load(rows / "trained.npy")))
    with pytest.raises(TrainError, match="no token is trained"):
        train(config(), inputs | {"rows": rows}, tmp_path / "out")


def test_leftovers_of_a_killed_life_are_cleared(inputs, tmp_path):
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "metrics.jsonl").write_text("torn")
    train(config(max_steps=1), inputs, tmp_path / "out")
    assert len(metrics(tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_every_row_is_seen_once_an_epoch_whatever_the_step(inputs):
    recipe = TrainConfig(row_tokens=32, tokens_per_step=160, micro_batch_tokens=32, epochs=3)
    budget = plan_budget(recipe, 25, 7)
    seen = [int(i) for step in range(budget.num_steps) for i in budget.rows_of_step(step)]
    assert budget.num_steps == 15
    epochs = [seen[i : i + 25] for i in (0, 25, 50)]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_no_step_is_wasted_at_a_rate_of_zero(schedule):
    budget = plan_budget(TrainConfig(warmup_share=0.2, epochs=10), 64, 0)
    shares = [budget.rate_share(step, schedule) for step in range(budget.num_steps)]
    assert min(shares) > 0
    assert max(shares) == 1.0
    assert shares.index(1.0) == budget.num_warmup_steps
