"""The table of docs/strategies.md is true: what it promises trains, what it refuses is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_dist.config.fields import check
from qlora_dist.config.model import Dtype, Quantization
from qlora_dist.config.train import Checkpointing, Method, StrategyConfig, StrategyName, check_supported
from qlora_dist.errors import ConfigError
from qlora_dist.train import train_adapter

DOC = Path(__file__).parents[2] / "docs" / "strategies.md"


def cells():
    lines = DOC.read_text().split("## What is supported")[1].split("## ")[0].splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for strategy, size, method, quantization, plain, recompute in table[2:]:
        yield strategy, int(size), method, quantization, "off", plain
        yield strategy, int(size), method, quantization, "on", recompute


def params():
    """What trains is slow; what is refused is not."""
    return [pytest.param(cell, marks=[pytest.mark.slow] if cell[-1] == "yes" else []) for cell in cells()]


@pytest.mark.parametrize("cell", params(), ids=lambda c: "-".join(map(str, c)))
def test_cell(cell, pool, inputs, recipe, tmp_path):
    strategy, world_size, method, quantization, recompute, promise = cell
    strategy, _, stage = strategy.partition(" ")
    config = recipe(
        activation_checkpointing=Checkpointing[recompute], max_steps=2, quantization=Quantization[quantization]
    )
    config.train.method = Method[method]
    config = replace(config, strategy=replace(config.strategy, name=StrategyName[strategy], world_size=world_size))
    config.strategy.zero_stage = int(stage or 2)
    if promise != "yes":
        with pytest.raises(ConfigError, match=r"strategy|train.method"):
            check(config.strategy, "strategy")
            check_supported(config.train, config.strategy)
        return
    check(config.strategy, "strategy")
    facts = pool.run(train_adapter, world_size, config, inputs, tmp_path)[0]
    assert facts["num_steps"] == 2
    assert (tmp_path / ("model.safetensors" if method == "full" else "adapter_model.safetensors")).exists()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", list(Checkpointing)[:2])
@pytest.mark.parametrize(("strategy", "stage"), [("ddp", 2), ("fsdp", 2), ("deepspeed", 3)])
def test_layers_that_nobody_adapts_are_divided_too(strategy, stage, recompute, pool, inputs, recipe, tmp_path):
    # In bfloat16, as the base is stored: so each rank reads its part.
    told = {"lora": {"target_modules": ["q_proj"]}, "dtype": Dtype.bfloat16}
    config = recipe(strategy, 2, activation_checkpointing=recompute, max_steps=2, **told)
    config.strategy.zero_stage = stage
    facts = pool.run(train_adapter, 2, config, inputs, tmp_path)[0]
    assert facts["num_steps"] == 2
    assert all(check["passed"] for check in facts["certificate"])
    names = load_file(tmp_path / "adapter_model.safetensors")
    layers = {f"base_model.model.model.layers.{k}.self_attn.q_proj" for k in range(3)}
    assert set(names) == {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}


@pytest.mark.parametrize(("world_size", "group"), [(1, 0), (2, 1)])
def test_nothing_is_divided_over_one(world_size, group):
    config = StrategyConfig(name=StrategyName.fsdp, world_size=world_size, ranks_per_group=group)
    with pytest.raises(ConfigError, match=r"strategy\.(world_size|ranks_per_group)=1: .*2 or more.*strategy=ddp"):
        check(config, "strategy")


def test_every_strategy_stands_in_the_table():
    assert {cell[0].split()[0] for cell in cells()} == {name.name for name in StrategyName}
