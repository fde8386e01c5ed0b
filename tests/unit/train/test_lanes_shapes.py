"""Layers that are given their input in another shape than rows of slots: each slot still meets its own lane."""

import logging

import pytest
import torch
import transformers

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import BaseConfig
from qlora_dist.errors import TrainError
from qlora_dist.model.base import load_model, open_base, prepare_base
from qlora_dist.model.lora import attach_lora
from qlora_dist.runtime import set_seed
from qlora_dist.testing import save_byte_tokenizer, save_tiny_model
from qlora_dist.train.batches import IGNORED, tensors
from qlora_dist.train.course import Course
from qlora_dist.train.engine import Engine
from qlora_dist.train.lanes import PEFT_PREFIX, LaneLinear
from qlora_dist.train.step import num_targets
from qlora_dist.train.strategies.ddp import ReplicatedBase
from tests.unit.train.conftest import train

WHOLE = ModelConfig(quantization=Quantization.none, compute_dtype=Dtype.float32)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A Qwen2-MoE: its shared expert is given all slots in one line."""
    top = tmp_path_factory.mktemp("moe")
    save_byte_tokenizer(top / "model")
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=512,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(top / "model")
    (top / "base").mkdir()
    told = ModelConfig(path=str(top / "model"), compute_dtype=Dtype.float32, quantization=Quantization.none)
    prepare_base(BaseConfig(model=told), {}, top / "base")
    return open_base(top / "base")


def of_peft(base, lane):
    """Returns the summed loss and the gradients of a lane's first step by PEFT, on the lane's own factors."""
    set_seed(lane.seed)
    model = attach_lora(load_model(base, WHOLE), lane.lora).train()
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    for name, value in lane.state().items():
        trained[name].data.copy_(value)
    batch = tensors(lane.rows, lane.budget.rows_of_step(0))
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )
    (loss / num_targets(lane, 0)).backward()
    return loss.item(), {name.removeprefix(PEFT_PREFIX): p.grad for name, p in trained.items()}


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_flat_slots_meet_the_factors_of_their_own_lane(moe, make_lane, num_lanes):
    lanes = [make_lane(f"{k}", seed=k, tokens_per_step=64, lora={"lora_rank": 4 + k}) for k in range(num_lanes)]
    stepper = Engine.build(WHOLE, moe, lanes, ReplicatedBase()).stepper
    generator = torch.Generator().manual_seed(1)
    for lane in lanes:
        for value in lane.parameters.values():
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    losses = stepper.accumulate(dict.fromkeys(range(num_lanes), 0), {k: num_targets(x, 0) for k, x in enumerate(lanes)})
    for k, lane in enumerate(lanes):
        loss, gradients = of_peft(moe, lane)
        assert any("shared_expert" in name for name in gradients)
        assert float(losses[k]) == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(lane.parameters[name].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def layer(make_engine, make_lane):
    """Returns an adapted layer and its seating, beneath 2 rows of 8 slots: of one lane, or of one lane each."""

    def make(num_lanes, **lora):
        stepper = make_engine(*[make_lane(f"{k}", seed=k, lora=lora) for k in range(num_lanes)]).stepper
        for lane in stepper.lanes:
            lane.values_P.data.normal_()
        layer = next(module for module in stepper.model.modules() if isinstance(module, LaneLinear))
        stepper.seating.shape = torch.Size((2, 8))
        stepper.seating.rows = {0: slice(0, 2)} if num_lanes == 1 else {0: slice(0, 1), 1: slice(1, 2)}
        stepper.seating.row_seeds = {0: [1, 2]} if num_lanes == 1 else {0: [1], 1: [2]}
        return layer

    return make


def test_flat_slots_are_rows_laid_end_to_end(layer):
    for num_lanes in (1, 2):
        adapted, x_BTI = layer(num_lanes), torch.randn(2, 8, 64)
        assert torch.equal(adapted(x_BTI.flatten(0, 1)), adapted(x_BTI).flatten(0, 1))
    assert adapted(torch.randn(0, 64)).shape[0] == 0


def test_whatever_a_lane_alone_is_given_is_its_own(layer):
    adapted, x_BTI = layer(1), torch.randn(2, 8, 64)
    some = torch.tensor([3, 4, 9])
    torch.testing.assert_close(adapted(x_BTI.flatten(0, 1)[some]), adapted(x_BTI).flatten(0, 1)[some])


@pytest.mark.parametrize(("num_lanes", "lora"), [(2, {}), (1, {"lora_dropout": 0.5})])
def test_slots_of_unknown_rows_are_refused_by_the_layers_name(layer, num_lanes, lora):
    adapted = layer(num_lanes, **lora).train()
    with pytest.raises(TrainError, match=r"layers.0.self_attn.q_proj is given \(3, 64\).*q_proj out of lora"):
        adapted(torch.randn(3, 64))


def test_dropout_is_the_same_in_flat_slots(layer):
    adapted, x_BTI = layer(1, lora_dropout=0.5).train(), torch.randn(2, 8, 64)
    assert torch.equal(adapted(x_BTI.flatten(0, 1)), adapted(x_BTI).flatten(0, 1))


def test_layers_that_nobody_adapts_are_held_frozen_too(make_lane, make_engine):
    from bitsandbytes.nn import Linear4bit

    from qlora_dist.model.frozen import frozen_linears

    lane = make_lane(lora={"target_modules": ["q_proj"]})
    model = make_engine(lane).stepper.model
    held = [layer.layer for _, layer in frozen_linears(model)]
    assert len(held) == 14
    assert {id(m) for m in model.modules() if isinstance(m, Linear4bit)} == {id(layer) for layer in held}
    assert {name.split(".")[-3] for name in lane.parameters} == {"q_proj"}


def test_a_base_with_dropout_of_its_own_trains_as_one_without(tmp_path, make_lane, caplog):
    caplog.set_level(logging.INFO, logger="qlora_dist")
    trained = []
    for share in (0.0, 0.5):
        top = tmp_path / f"{share}"
        save_tiny_model(top / "model", attention_dropout=share)
        (top / "base").mkdir()
        told = ModelConfig(path=str(top / "model"), compute_dtype=Dtype.float32)
        prepare_base(BaseConfig(model=told), {}, top / "base")
        lanes = [make_lane(f"{k}", seed=k, max_steps=3) for k in range(2)]
        engine = Engine.build(told, open_base(top / "base"), lanes, ReplicatedBase())
        train(engine, [Course(lane, top / lane.name) for lane in lanes])
        trained.append(lanes)
    for plain, dropping in zip(*trained, strict=True):
        assert all(torch.equal(p, dropping.parameters[name]) for name, p in plain.parameters.items())
    assert len([message for message in caplog.messages if "attention_dropout=0.5 is off" in message]) == 1
