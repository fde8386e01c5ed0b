"""`train.compile`: the same losses and gradients, fewer kernels; products with frozen and adapted layers stay out."""

import pytest
import torch

from qlora_dist.config.train import Checkpointing, StrategyConfig, StrategyName, TrainConfig, check_supported
from qlora_dist.errors import ConfigError
from qlora_dist.train.compiled import check_compiler


@pytest.mark.slow
def test_compiled_layers_train_the_same_adapters(make_engine, make_lane):
    def lanes(**train):
        for k, rank in enumerate((4, 8)):
            yield make_lane(f"{k}", lora={"lora_rank": rank, "lora_dropout": 0.1 * k}, seed=k, **train)

    plain, compiled = list(lanes()), list(lanes(compile=True))
    one, other = make_engine(*plain).stepper, make_engine(*compiled).stepper
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        a, b = one.take(dict.fromkeys(range(2), step)), other.take(dict.fromkeys(range(2), step))
        for k in range(2):
            assert b[k].loss == pytest.approx(a[k].loss, rel=1e-5)
            assert b[k].grad_norm == pytest.approx(a[k].grad_norm, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for mine, theirs in zip(compiled, plain, strict=True):
        assert torch.allclose(mine.values_P, theirs.values_P, atol=1e-4)


def test_a_compiler_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train.compile=true needs a C\+\+ compiler; no-such-compiler isn't here"):
        check_compiler()


@pytest.mark.parametrize("recompute", [Checkpointing.on, Checkpointing.auto])
def test_layers_that_are_computed_again_are_not_compiled(recompute):
    train = TrainConfig(compile=True, activation_checkpointing=recompute)
    with pytest.raises(ConfigError, match=r"train.compile=true: expected false with train.activation_checkpointing"):
        check_supported(train, StrategyConfig(name=StrategyName.ddp))


@pytest.mark.parametrize("name", [StrategyName.single, StrategyName.deepspeed])
def test_other_workflows_are_not_compiled(name):
    with pytest.raises(ConfigError, match=r"train.compile=true: expected false with strategy="):
        check_supported(TrainConfig(compile=True), StrategyConfig(name=name, world_size=2))
