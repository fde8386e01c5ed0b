"""The memory model says what a training leaves for its backward pass, counted on a real model."""

import pytest
import torch

from qlora_dist.config.model import Dtype, ModelConfig
from qlora_dist.config.stages import BaseConfig
from qlora_dist.config.train import Checkpointing, LoraConfig, TrainConfig
from qlora_dist.data.rows import Rows
from qlora_dist.model.base import open_base, prepare_base
from qlora_dist.model.footprint import base_bytes, lane_bytes, shape_in, shape_of, trained_bytes
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train.budget import plan_budget
from qlora_dist.train.engine import Engine
from qlora_dist.train.lanes import Lane
from qlora_dist.train.strategies.ddp import ReplicatedBase


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", hidden_size=128, num_layers=8)


@pytest.mark.parametrize("recompute", [Checkpointing.off, Checkpointing.on])
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_counts_what_is_kept(dtype, recompute, folder, tmp_path):
    model = ModelConfig(path=str(folder), compute_dtype=dtype)
    (tmp_path / "base").mkdir()
    prepare_base(BaseConfig(model=model), {}, tmp_path / "base")
    rows = Rows.open(save_rows(tmp_path / "rows", 8, 128))
    train = TrainConfig(row_tokens=128, tokens_per_step=512, micro_batch_tokens=512, activation_checkpointing=recompute)
    lane = Lane("one", LoraConfig(lora_rank=4), train, 1, rows, plan_budget(train, 8, 1))
    base = open_base(tmp_path / "base")
    engine = Engine.build(model, base, [lane], ReplicatedBase())
    shape = shape_of(model)
    assert shape == shape_in(folder)
    factors = trained_bytes(train) * sum(p.numel() for p in lane.parameters.values())
    predicted = lane_bytes(shape, model, lane.lora, train) - factors
    assert predicted == pytest.approx(kept_bytes(engine), rel=0.25 if recompute is Checkpointing.on else 0.1)
    linear = 8 * sum(i * o for i, o in shape.linears().values())
    assert base_bytes(shape, model) == pytest.approx(engine.whole_bytes + 0.127 / 8 * linear, rel=0.02), "scales apart"


def kept_bytes(engine):
    """Returns the most bytes that autograd keeps at once: all of the forward pass, or what a recomputed layer adds."""
    weights = {p.untyped_storage().data_ptr() for p in engine.stepper.model.parameters()}
    held, most = {}, [0]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.setdefault(storage.data_ptr(), storage.nbytes())
            alive.append(tensor)
        most[0] = max(most[0], sum(held.values()))
        return tensor

    alive = []
    batch = engine.stepper._seat({0: 0}, 0, [0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine.stepper.model(**batch).sum()
    forward = most[0]
    if not engine.recomputes:
        return forward
    layer = engine.stepper.model.model.model.layers[0]
    held.clear()
    layer.gradient_checkpointing = False
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.stepper.model(**batch).sum()
    most_of_one = most[0]
    assert loss.isfinite()
    return most_of_one
