"""Activation checkpointing: off, on, or by the memory model; it changes memory, and no loss."""

import json

import pytest

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import AdapterConfig, BaseConfig
from qlora_dist.config.train import Checkpointing, LoraConfig, Method, StrategyConfig, StrategyName, TrainConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import ConfigError
from qlora_dist.launch.compose import compose_run
from qlora_dist.model.base import open_base, prepare_base
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train import engine, huggingface, train_adapter
from qlora_dist.train.budget import plan_budget
from qlora_dist.train.lanes import Lane
from qlora_dist.train.strategies import choice
from qlora_dist.train.strategies.choice import needed_bytes
from qlora_dist.train.strategies.ddp import ReplicatedBase


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    top = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(top / "model")
    (top / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model), compute_dtype=Dtype.float32)), {}, top / "base")
    return {"base": top / "base", "tokenizer": model, "rows": save_rows(top / "rows", 16)}


def config(strategy, checkpointing, method=Method.lora):
    return AdapterConfig(
        model=ModelConfig(compute_dtype=Dtype.float32),
        lora=LoraConfig(lora_rank=4, lora_dropout=0.0 if strategy == "single" else 0.1),
        train=TrainConfig(
            method=method,
            row_tokens=32,
            tokens_per_step=128,
            micro_batch_tokens=64,
            max_steps=3,
            activation_checkpointing=Checkpointing[checkpointing],
        ),
        strategy=StrategyConfig(name=StrategyName[strategy]),
        seed=2,
    )


@pytest.fixture
def losses(inputs, tmp_path):
    def train(config, name):
        (tmp_path / name).mkdir()
        facts = train_adapter(config, inputs, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], facts["activation_checkpointing"]

    return train


@pytest.mark.parametrize("strategy", ["single", "ddp", "auto"])
def test_changes_no_loss_and_auto_asks_the_memory(strategy, losses, monkeypatch):
    off, on = (losses(config(strategy, how), how) for how in ("off", "on"))
    assert (off[1], on[1]) == ("off", "on")
    assert on[0] == pytest.approx(off[0], rel=1e-6)
    roomy = losses(config(strategy, "auto"), "roomy")
    assert roomy[1] == "off"
    for module in (choice, huggingface):
        monkeypatch.setattr(module, "free_memory_bytes", lambda: 1_000_000)
    assert losses(config(strategy, "auto"), "short") == on


def test_full_fine_tuning_asks_too(losses, monkeypatch):
    monkeypatch.setattr(huggingface, "free_memory_bytes", lambda: 1_000_000)
    assert losses(config("single", "auto", Method.full), "short")[1] == "on"


@pytest.mark.parametrize("quantization", list(Quantization))
def test_auto_asks_for_memory_before_the_base_has_taken_its_own(quantization, inputs, monkeypatch):
    happened = []

    def note(module, name):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: happened.append(name) or plain(*args, **options))

    note(choice, "free_memory_bytes")
    note(engine, "load_model")
    note(engine, "build_skeleton")
    told = config("ddp", "auto")
    rows = Rows.open(inputs["rows"])
    lane = Lane("a", told.lora, told.train, 1, rows, plan_budget(told.train, rows.num_rows, 1))
    model = ModelConfig(compute_dtype=Dtype.float32, quantization=quantization)
    engine.Engine.build(model, open_base(inputs["base"]), [lane], ReplicatedBase())
    assert happened == ["free_memory_bytes", "build_skeleton" if quantization is Quantization.nf4 else "load_model"]


def test_more_is_needed_of_a_whole_base_and_of_kept_activations(inputs):
    base, told = open_base(inputs["base"]), config("ddp", "off")
    off, on = (needed_bytes(told.model, base, [told], recomputed) for recomputed in (False, True))
    assert off > on > needed_bytes(told.model, base, [told], True, num_parts=4)
    assert needed_bytes(told.model, base, [told] * 3, True) > on


def test_a_bare_on_of_a_yaml_file_is_told_to_want_quotes():
    with pytest.raises(ConfigError, match=r"one of off, on, auto.*with quotes"):
        compose_run(["train.activation_checkpointing=true"])
