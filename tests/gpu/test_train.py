"""On a GPU: the loop agrees with the standard workflow, and the pre-quantized base has the bits of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.config.model import ModelConfig
from qlora_dist.config.stages import AdapterConfig, BaseConfig
from qlora_dist.config.train import LoraConfig, Optimizer, StrategyConfig, StrategyName, TrainConfig
from qlora_dist.model.base import load_model, open_base, prepare_base
from qlora_dist.model.prequantized import load_prequantized
from qlora_dist.testing import requires_gpu, save_rows, save_tiny_model
from qlora_dist.train import train_adapter


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    top = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(top / "model", hidden_size=256, dtype="bfloat16")
    (top / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, top / "base")
    return {"base": top / "base", "tokenizer": model, "rows": save_rows(top / "rows", 64, 128)}


@requires_gpu
def test_loop_agrees_with_the_standard_workflow(inputs, tmp_path):
    found = {}
    for name in (StrategyName.single, StrategyName.ddp):
        out = tmp_path / name.name
        out.mkdir()
        recipe = TrainConfig(row_tokens=128, tokens_per_step=1024, micro_batch_tokens=512, learning_rate=1e-3)
        config = AdapterConfig(lora=LoraConfig(), train=recipe, strategy=StrategyConfig(name=name), seed=1)
        train_adapter(config, inputs, out)
        lines = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        found[name] = (lines, load_file(out / "adapter_model.safetensors"))
    (theirs, their_adapter), (ours, our_adapter) = found.values()
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert our_adapter.keys() == their_adapter.keys()


@requires_gpu
@pytest.mark.parametrize("name", [StrategyName.single, StrategyName.ddp])
@pytest.mark.parametrize("kind", Optimizer)
def test_optimizers_of_every_kind_lower_the_loss(kind, name, inputs, tmp_path):
    recipe = TrainConfig(row_tokens=128, tokens_per_step=1024, micro_batch_tokens=512, epochs=8, optimizer=kind)
    strategy = StrategyConfig(name=name)
    config = AdapterConfig(lora=LoraConfig(lora_rank=32), train=recipe, strategy=strategy, seed=1)
    train_adapter(config, inputs, tmp_path)
    lines = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] < lines[0]


@requires_gpu
def test_compiled_layers_change_nothing_but_rounding(inputs, tmp_path):
    losses = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        out.mkdir()
        recipe = TrainConfig(row_tokens=128, tokens_per_step=1024, micro_batch_tokens=512, compile=compiled)
        strategy = StrategyConfig(name=StrategyName.ddp)
        train_adapter(AdapterConfig(lora=LoraConfig(), train=recipe, strategy=strategy, seed=1), inputs, out)
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@requires_gpu
def test_prequantized_base_has_the_bits_of_transformers(inputs):
    base = open_base(inputs["base"])
    theirs, ours = load_model(base, ModelConfig()), load_prequantized(base, ModelConfig())
    tokens = torch.arange(64, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
