"""Several real processes, kept over the tests of this room, and inputs small enough for them."""

from dataclasses import replace

import pytest

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import AdapterConfig, BaseConfig
from qlora_dist.config.train import LoraConfig, StrategyConfig, StrategyName, TrainConfig
from qlora_dist.model.base import prepare_base
from qlora_dist.testing import RankPool, save_rows, save_tiny_model


@pytest.fixture(scope="session")
def pool():
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    top = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(top / "model", num_layers=3)
    (top / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model))), {}, top / "base")
    rows, held_out = save_rows(top / "rows", 40), save_rows(top / "validation", 5, seed=1)
    return {"base": top / "base", "tokenizer": model, "rows": rows, "validation": held_out}


@pytest.fixture(scope="session")
def recipe():
    """Builds a config: `recipe("fsdp", 2, dtype=..., micro_batch_tokens=...)`."""

    def build(strategy="ddp", world_size=1, *, dtype=Dtype.float32, quantization=Quantization.nf4, lora=None, **train):
        fields = {"row_tokens": 32, "tokens_per_step": 256, "micro_batch_tokens": 32, "learning_rate": 0.01} | train
        lora = replace(LoraConfig(lora_rank=4), **(lora or {}))
        return AdapterConfig(
            model=ModelConfig(quantization=quantization, compute_dtype=dtype),
            lora=lora,
            train=TrainConfig(**fields),
            strategy=StrategyConfig(name=StrategyName[strategy], world_size=world_size, timeout_s=60),
            seed=3,
        )

    return build
