"""A small base with rows, and an engine on it in this process."""

import math

import pytest

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import BaseConfig
from qlora_dist.config.train import LoraConfig, TrainConfig
from qlora_dist.data.rows import Rows
from qlora_dist.model.base import open_base, prepare_base
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train.budget import plan_budget
from qlora_dist.train.course import Course
from qlora_dist.train.engine import Engine
from qlora_dist.train.lanes import Lane
from qlora_dist.train.loop import Loop
from qlora_dist.train.strategies.ddp import ReplicatedBase


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    top = tmp_path_factory.mktemp("base")
    save_tiny_model(top / "model")
    (top / "out").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(top / "model"), compute_dtype=Dtype.float32)), {}, top / "out")
    return open_base(top / "out")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return Rows.open(save_rows(tmp_path_factory.mktemp("rows"), 24))


@pytest.fixture
def make_lane(rows):
    def make(name="adapter", *, lora=None, seed=3, rows=rows, **train):
        recipe = {"row_tokens": 32, "tokens_per_step": 128, "micro_batch_tokens": 64, "learning_rate": 0.01} | train
        config = TrainConfig(**recipe)
        lora = LoraConfig(**({"lora_rank": 4} | (lora or {})))
        return Lane(name, lora, config, seed, rows, plan_budget(config, rows.num_rows, seed))

    return make


@pytest.fixture
def make_engine(base):
    def make(*lanes, quantization=Quantization.nf4):
        model = ModelConfig(quantization=quantization, compute_dtype=Dtype.float32)
        return Engine.build(model, base, list(lanes), ReplicatedBase())

    return make


def distance(a, b):
    """The relative distance of two adapters, the factors of all layers taken together."""
    pairs = [(a.parameters[name], b.parameters[name]) for name in a.parameters]
    return math.sqrt(
        sum(float((x - y).square().sum()) for x, y in pairs) / sum(float(y.square().sum()) for _, y in pairs)
    )


def train(engine, courses):
    """Examines and trains; raises the first error that ended a lane."""
    engine.examine(courses)
    Loop(engine.stepper, courses, 600).run()
    for course in courses:
        if course.error is not None:
            raise course.error


@pytest.fixture
def run(make_engine, tmp_path):
    """Examines and trains lanes to their ends; returns the engine."""

    def go(*lanes, **options):
        engine = make_engine(*lanes, **options)
        courses = [Course(lane, tmp_path / "-".join(n.name for n in lanes) / lane.name) for lane in lanes]
        train(engine, courses)
        return engine

    return go
