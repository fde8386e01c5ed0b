"""Moments of lanes in 8 bits: held so, near those of 32 bits, apart from any neighbour, and the same after a stop."""

import pytest
import torch

from qlora_dist.config.train import Optimizer, StrategyConfig, StrategyName, TrainConfig, check_supported
from qlora_dist.errors import ConfigError
from qlora_dist.train.checkpoint import lane_state, restore
from qlora_dist.train.moments import FactorAdam, adamw
from tests.unit.train.conftest import distance

WIDE = {"lora_rank": 128}
"""A rank at which factors have the 4,096 values from which bitsandbytes codes them."""


def steps(stepper, *numbers):
    return [stepper.take(dict.fromkeys(range(len(stepper.lanes)), step))[0].loss for step in numbers]


def test_wide_factors_are_held_in_a_byte_and_lead_where_32_bits_lead(make_engine, make_lane):
    losses = {}
    for kind in (Optimizer.adamw, Optimizer.adamw_8bit):
        lane = make_lane(lora=WIDE, optimizer=kind, learning_rate=2e-3)
        losses[kind] = steps(make_engine(lane).stepper, *range(6))
        state = lane.optimizer_state()
        assert state["#step"] == 6
    held = {name.rpartition("#")[2] for name, value in state.items() if value.dtype is torch.uint8}
    assert held == {"state1", "state2"}
    assert isinstance(lane.optimizer, FactorAdam)
    assert losses[Optimizer.adamw_8bit] == pytest.approx(losses[Optimizer.adamw], rel=0.01)
    assert losses[Optimizer.adamw_8bit] != losses[Optimizer.adamw]


def test_a_lane_beside_others_of_unequal_rank_is_its_solo_run(make_engine, make_lane):
    def make(rank):
        return make_lane(f"{rank}", lora={"lora_rank": rank}, optimizer=Optimizer.adamw_8bit, learning_rate=1e-3)

    together = [make(rank) for rank in (96, 128, 4)]
    steps(make_engine(*together).stepper, *range(4))
    for lane in together:
        alone = make(lane.lora.lora_rank)
        steps(make_engine(alone).stepper, *range(4))
        assert distance(lane, alone) < 1e-3  # a rounding of 1e-7 may choose the next code


def test_moments_of_a_checkpoint_go_on_to_the_bit(make_engine, make_lane):
    whole, first, second = (make_lane(lora=WIDE, optimizer=Optimizer.adamw_8bit) for _ in range(3))
    steps(make_engine(whole).stepper, *range(5))
    steps(make_engine(first).stepper, *range(2))
    kept = {name: value.clone() for name, value in lane_state(first).items()}
    stepper = make_engine(second).stepper
    restore(second, kept)
    assert second.optimizer_state()["#step"] == 2
    steps(stepper, *range(2, 5))
    assert torch.equal(second.values_P, whole.values_P)
    for name, value in lane_state(second).items():
        assert torch.equal(value, lane_state(whole)[name]), name


def test_zero_refuses_moments_that_it_cannot_divide():
    strategy = StrategyConfig(name=StrategyName.deepspeed, world_size=2)
    with pytest.raises(ConfigError, match=r"Set train.optimizer=adamw, or strategy=ddp or fsdp"):
        check_supported(TrainConfig(optimizer=Optimizer.adamw_8bit), strategy)
    for name in (StrategyName.ddp, StrategyName.fsdp, StrategyName.auto):
        check_supported(TrainConfig(optimizer=Optimizer.adamw_8bit), StrategyConfig(name=name, world_size=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="pages work on a GPU")
def test_pages_want_a_gpu():
    with pytest.raises(ConfigError, match=r"train.optimizer=paged_adamw: expected adamw without a GPU"):
        adamw(TrainConfig(optimizer=Optimizer.paged_adamw), [torch.nn.Parameter(torch.zeros(1))])


def test_number_of_steps_is_asked_of_the_device_once_a_step(make_engine, make_lane, monkeypatch):
    lane = make_lane(optimizer=Optimizer.adamw_8bit)
    stepper = make_engine(lane).stepper
    steps(stepper, 0, 1)
    asked, plain = [], torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: asked.append(1) or plain(self))
    lane.optimizer.step()
    assert len(asked) == 1
