"""No key that a user may set makes a good training fail as "left unread": each has an effect, or is told to have none.

A field that is added to one of these dataclasses needs a value in `OTHER`: the first test fails until it has one.
"""

from dataclasses import fields, replace

import pytest

from qlora_dist.config.model import Dtype, ModelConfig, Quantization, TinyConfig
from qlora_dist.config.stages import AdapterConfig, BaseConfig
from qlora_dist.config.train import LoraConfig, Method, Optimizer, Schedule, StrategyConfig, StrategyName, TrainConfig
from qlora_dist.errors import ConfigError
from qlora_dist.model.base import prepare_base
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train import train_adapter, train_adapters

OTHER = {
    LoraConfig: {
        "lora_rank": 4,
        "lora_alpha": 32.0,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
    },
    TrainConfig: {
        "method": Method.full,
        "row_tokens": 32,
        "tokens_per_step": 128,
        "epochs": 2.0,
        "max_steps": 2,
        "learning_rate": 0.01,
        "schedule": Schedule.linear,
        "warmup_share": 0.5,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "optimizer": Optimizer.adamw_8bit,
        "max_grad_norm": 0.5,
    },
    ModelConfig: {
        "path": "",  # the folder, once it is made
        "revision": "0" * 40,
        "quantization": Quantization.none,
        "double_quant": False,
        "compute_dtype": Dtype.float32,
    },
    StrategyConfig: {},
    TinyConfig: {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 2,
        "num_key_value_heads": 1,
        "context_tokens": 32,
        "pretrain_tokens": 0,
        "tokens_per_step": 64,
        "learning_rate": 1e-3,
        "domain_sample_bytes": 0,
        "seed": 5,
    },
}
"""A valid value, other than the default, of each field that says what is made."""


@pytest.mark.parametrize("kind", OTHER, ids=lambda kind: kind.__name__)
def test_each_field_has_another_value_here(kind):
    own = {f.name for f in fields(kind) if not f.metadata.get("execution")}
    assert own == OTHER[kind].keys()
    plain = kind()
    assert [name for name, value in OTHER[kind].items() if value == getattr(plain, name)] in ([], ["path"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    top = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(top / "model")
    (top / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, top / "base")
    return {"base": top / "base", "tokenizer": model, "rows": save_rows(top / "rows", 16)}


@pytest.fixture
def other(inputs):
    """Builds a config of which every field is another than the default, but for those that are named."""

    def build(strategy, *, path=True, **kept):
        own = {name: value for values in ({}, *OTHER.values()) for name, value in values.items()} | kept
        made = {
            kind: kind(**{name: kept.get(name, value) for name, value in values.items()})
            for kind, values in OTHER.items()
        }
        model = replace(made[ModelConfig], path=str(inputs["tokenizer"]) if path else "", tiny=made[TinyConfig])
        model.revision = own["revision"] if path else ""
        made[TrainConfig].micro_batch_tokens = 64
        return AdapterConfig(
            model=model,
            lora=made[LoraConfig],
            train=made[TrainConfig],
            strategy=StrategyConfig(name=StrategyName[strategy]),
            seed=9,
        )

    return build


def read_row(facts):
    (row,) = [row for row in facts["certificate"] if row["check"] == "no config key is left unread"]
    assert row["passed"]
    return row["found"]


IN_BOTH = {
    "tokens are trained",
    "the end token is trained",
    "each step has targets",
    "no attention between segments",
    "every tensor learns",
    "the loss is finite",
    "no config key is left unread",
}
OF_ADAPTERS = IN_BOTH | {
    "one dtype for the base, float32 for adapters",
    "the base is stored as asked",
    "the base is unchanged",
    "the saved adapter is the trained one",
}
OF_THE_LOOP = OF_ADAPTERS | {
    "each rank holds its part of the base",
    "the loss is the model's own",
    "rows come in the recipe's order",
    "all ranks hold the same adapter",
}
"""What every certificate holds: the loop's, the standard workflow's, and that of full fine-tuning."""


NF4 = {"method": Method.lora, "quantization": Quantization.nf4}
DENSE = {"method": Method.lora}


@pytest.mark.parametrize(
    ("strategy", "kept", "idle"),
    [
        ("ddp", NF4 | {"path": False}, ""),
        ("ddp", DENSE, "model.double_quant"),
        ("auto", NF4 | {"compute_dtype": Dtype.bfloat16}, ""),
        ("single", NF4, ""),
        ("single", DENSE, "model.double_quant"),
        ("single", {}, "lora."),
    ],
)
def test_every_key_is_read_or_said_to_be_idle(strategy, kept, idle, other, inputs, tmp_path):
    facts = train_adapter(other(strategy, **kept), inputs, tmp_path)
    assert facts["num_steps"] == 2
    promised = OF_THE_LOOP if strategy != "single" else OF_ADAPTERS if kept else IN_BOTH
    assert {row["check"] for row in facts["certificate"]} == promised
    assert all(row["passed"] and row["found"] for row in facts["certificate"])
    told = read_row(facts).partition("without effect here: ")[2]
    assert all(key.startswith((idle, "strategy.", "train.", "model.")) for key in told.split(", "))
    assert (idle in told) if idle else not told.startswith(("lora", "model"))


def test_lanes_of_one_job_raise_no_alarm(other, inputs, tmp_path):
    first = other("ddp", **NF4)
    second = replace(first, lora=LoraConfig(lora_rank=8), train=replace(first.train, weight_decay=0.0), seed=10)
    outs = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for out in outs.values():
        out.mkdir()
    made = train_adapters({"a": first, "b": second}, dict.fromkeys(outs, inputs), outs)
    for label in outs:
        read_row(made[label])


def test_an_adapter_of_the_head_is_refused(inputs, tmp_path):
    train = TrainConfig(row_tokens=32, tokens_per_step=128, micro_batch_tokens=64)
    for name in (StrategyName.single, StrategyName.ddp):
        config = AdapterConfig(
            lora=LoraConfig(target_modules=["q_proj", "lm_head"]), train=train, strategy=StrategyConfig(name=name)
        )
        with pytest.raises(ConfigError, match=r"lora\.target_modules=.?lm_head.*the head stays as it is"):
            train_adapter(config, inputs, tmp_path)
