"""DeepSpeed's ZeRO behind the one loop: the steps of `ddp`, divided state, checkpoints that know no strategy."""

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.data.rows import Rows
from qlora_dist.model.base import load_model, open_base
from qlora_dist.train import train_adapter
from qlora_dist.train.validation import mean_loss
from tests.dist.test_resume import stopped_after
from tests.dist.test_strategies import distance, train  # noqa: F401 - a fixture

pytest.importorskip("deepspeed")


@pytest.fixture
def zero(recipe):
    def build(stage, world_size=2, **fields):
        config = recipe("deepspeed", world_size, **fields)
        config.strategy.zero_stage = stage
        return config

    return build


@pytest.mark.parametrize("stage", [2, 3])
def test_takes_the_steps_of_ddp(stage, train, zero, recipe):  # noqa: F811
    adapter, metrics, facts = train(zero(stage), "zero")
    other, lines, plain = train(recipe("ddp", 1), "ddp")
    assert metrics[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert metrics[0]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-5)
    assert distance(adapter, other) < 1e-3
    assert all(check["passed"] for check in facts["certificate"])
    share = facts["base_bytes_per_rank"] / plain["base_bytes_per_rank"]
    assert share == pytest.approx(1.0 if stage == 2 else 0.5, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_four_ranks_agree_with_the_standard_workflow_and_load_in_peft(stage, train, zero, recipe, inputs, tmp_path):  # noqa: F811
    _, metrics, facts = train(zero(stage, 4), "zero")
    _, lines, _ = train(recipe("single", 1, micro_batch_tokens=128), "single")
    assert metrics[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert metrics[0]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-5)
    model = ModelConfig(quantization=Quantization.nf4, compute_dtype=Dtype.float32)
    loaded = PeftModel.from_pretrained(load_model(open_base(inputs["base"]), model), str(tmp_path / "zero")).eval()
    loss = mean_loss(loaded, Rows.open(inputs["validation"]), 64)
    assert loss == pytest.approx(facts["validation_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_stays_in_the_band_of_ddp(stage, train, zero, recipe):  # noqa: F811
    adapter, metrics, _ = train(zero(stage, dtype=Dtype.bfloat16), "zero")
    other, lines, _ = train(recipe("ddp", 2, dtype=Dtype.bfloat16), "ddp")
    assert metrics[0]["loss"] == lines[0]["loss"]
    assert distance(adapter, other) < 5e-3, "moments are rounded apart, and bfloat16 makes more of it"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "goes_on"), [(3, "deepspeed"), (2, "ddp"), (3, "fsdp")])
def test_checkpoint_continues_under_any_strategy(stage, goes_on, train, zero, pool, inputs, recipe, tmp_path):  # noqa: F811
    whole, _, _ = train(recipe("ddp", 1, epochs=4), "whole")
    out = tmp_path / "out"
    out.mkdir()
    stopped_after(pool, inputs, out, zero(stage, 4, epochs=4), world_size=4)
    config = zero(2, epochs=4) if goes_on == "deepspeed" else recipe(goes_on, 2, epochs=4)
    facts = pool.run(train_adapter, 2, config, inputs, out)[0]
    assert facts["resumed_after_step"] == 8
    assert distance(load_file(out / "adapter_model.safetensors"), whole) < 1e-2
