"""Lanes over several processes: each adapter of a group is the adapter of its own run, replicated or sharded."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from qlora_dist.config.train import LoraConfig
from qlora_dist.train import train_adapter, train_adapters

RANKS = (4, 8, 16, 24, 64)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_group_over_two_processes_is_its_solo_runs(pool, inputs, recipe, tmp_path, strategy):
    configs = {}
    for k, rank in enumerate(RANKS):
        one = recipe(strategy, 2, max_steps=3, tokens_per_step=(128, 256)[k % 2], learning_rate=1e-3 * (1 + k % 3))
        configs[f"r{rank}"] = replace(one, lora=LoraConfig(lora_rank=rank, lora_alpha=8.0 * (1 + k % 2)), seed=k)
    outs = {label: tmp_path / label for label in configs}
    for out in outs.values():
        out.mkdir()
    pool.run(train_adapters, 2, configs, dict.fromkeys(configs, inputs), outs)
    for label in (f"r{RANKS[0]}", f"r{RANKS[-1]}"):
        alone = tmp_path / f"{label}-alone"
        alone.mkdir()
        pool.run(train_adapter, 2, configs[label], inputs, alone)
        found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (outs[label], alone))
        assert found.keys() == wanted.keys()
        gap = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted)
        assert gap <= 1e-10 * sum(float(value.square().sum()) for value in wanted.values())
