"""Every strategy takes the same steps, on one process or four, and leaves an adapter that PEFT loads."""

import json

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.train import Checkpointing
from qlora_dist.model.base import load_model, open_base
from qlora_dist.train import train_adapter


@pytest.fixture
def train(pool, inputs, tmp_path):
    def run(config, name="out"):
        out = tmp_path / name
        out.mkdir()
        facts = pool.run(train_adapter, config.strategy.world_size, config, inputs, out)[0]
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return load_file(out / "adapter_model.safetensors"), metrics, facts

    return run


def distance(a, b):
    """The largest relative difference of any tensor."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)) for n in a)


def test_layouts_take_the_same_step(train, recipe):
    layouts = {
        "1x8": recipe("ddp", 1, micro_batch_tokens=32),
        "2x4": recipe("ddp", 2, micro_batch_tokens=32),
        "4x2": recipe("ddp", 4, micro_batch_tokens=32),
        "fsdp 2x4": recipe("fsdp", 2, micro_batch_tokens=32),
    }
    found = {name: train(config, name) for name, config in layouts.items()}
    adapter, metrics, facts = found.pop("1x8")
    for name, (other, lines, other_facts) in found.items():
        assert lines[0]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-6), name
        assert lines[0]["grad_norm"] == pytest.approx(metrics[0]["grad_norm"], rel=1e-5), name
        assert distance(other, adapter) < 1e-3, name
        assert other_facts["validation_loss"] == pytest.approx(facts["validation_loss"], rel=1e-5), name


def test_fsdp_shards_the_4bit_base(train, recipe):
    _, _, facts = train(recipe("fsdp", 4, dtype=Dtype.bfloat16, max_steps=2))
    checks = {c["check"]: c for c in facts["certificate"]}
    assert checks["each rank holds its part of the base"]["passed"]
    assert "0 tensors whole" in checks["each rank holds its part of the base"]["found"]
    _, _, whole = train(recipe("ddp", 1, dtype=Dtype.bfloat16, max_steps=2), "whole")
    assert facts["base_bytes_per_rank"] < 0.3 * whole["base_bytes_per_rank"]


def test_fsdp_computes_the_bits_of_ddp(train, recipe):
    ddp, _, _ = train(recipe("ddp", 2, dtype=Dtype.bfloat16, dense_cache_share=0.0), "ddp")
    fsdp, _, _ = train(recipe("fsdp", 2, dtype=Dtype.bfloat16), "fsdp")
    assert distance(fsdp, ddp) == 0


def test_hybrid_sharding_agrees(train, recipe):
    config = recipe("fsdp", 4)
    config.strategy.ranks_per_group = 2
    adapter, _, facts = train(config)
    whole, _, _ = train(recipe("ddp", 1), "whole")
    assert distance(adapter, whole) < 1e-3
    assert "in 2 parts" in next(c["found"] for c in facts["certificate"] if "its part" in c["check"])


@pytest.mark.parametrize(
    ("quantization", "recompute"),
    [(Quantization.nf4, "on"), (Quantization.none, "on"), (Quantization.nf4, "auto")],
)
def test_activation_checkpointing_changes_nothing(train, recipe, quantization, recompute):
    config = recipe(
        "fsdp",
        2,
        quantization=quantization,
        activation_checkpointing=Checkpointing[recompute],
        lora={"lora_dropout": 0.2},
    )
    adapter, _, facts = train(config)
    assert facts["activation_checkpointing"] == ("on" if recompute == "on" else "off")
    plain, _, _ = train(recipe("ddp", 2, quantization=quantization, lora={"lora_dropout": 0.2}), "plain")
    assert distance(adapter, plain) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_layers_change_nothing_but_rounding(train, recipe, strategy):
    compiled, lines, _ = train(recipe(strategy, 2, compile=True), "compiled")
    plain, plain_lines, _ = train(recipe(strategy, 2), "plain")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in plain_lines], rel=1e-4)
    assert 0 < distance(compiled, plain) < 1e-2


def test_loop_agrees_with_the_standard_workflow(train, recipe):
    standard, lines, facts = train(recipe("single", 1, micro_batch_tokens=128, epochs=2), "single")
    ours, our_lines, our_facts = train(recipe("ddp", 1, micro_batch_tokens=128, epochs=2), "ddp")
    assert our_lines[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert our_lines[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=1e-5)
    assert distance(ours, standard) < 1e-3
    assert our_facts["validation_loss"] == pytest.approx(facts["validation_loss"], rel=1e-6)


def test_adapter_of_several_ranks_loads_in_peft(train, recipe, inputs, tmp_path):
    _, _, facts = train(recipe("fsdp", 2, epochs=3))
    base = open_base(inputs["base"])
    whole = ModelConfig(quantization=Quantization.nf4, compute_dtype=Dtype.float32)
    model = PeftModel.from_pretrained(load_model(base, whole), str(tmp_path / "out")).eval()
    from qlora_dist.data.rows import Rows
    from qlora_dist.train.validation import mean_loss

    loss = mean_loss(model, Rows.open(inputs["validation"]), 64)
    assert loss == pytest.approx(facts["validation_loss"], rel=1e-5)
