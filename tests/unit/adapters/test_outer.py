"""Averaging workers from a shared start: the outer step, a round on disk, and workers that died."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.adapters.merge import merge_adapters
from qlora_dist.adapters.outer import average_round, outer_step
from qlora_dist.config.merge import MergeWeights, OuterConfig
from qlora_dist.config.stages import MergedConfig, RoundsConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.adapter import read_provenance, write_provenance

from .conftest import provenance

MEAN = RoundsConfig(outer=OuterConfig(learning_rate=1.0, momentum=0.0))


def moved(start: Path, name: str, by: float, tokens: int = 0) -> Path:
    """Returns a worker's folder: the start with every value moved."""
    folder = start.parent / name
    shutil.copytree(start, folder)
    values = {key: tensor + by for key, tensor in load_file(start / "adapter_model.safetensors").items()}
    save_file(values, folder / "adapter_model.safetensors")
    if tokens:
        write_provenance(folder, provenance(trained_tokens=tokens))
    return folder


def run(config: RoundsConfig, inputs: dict[str, Path], name: str) -> tuple[Path, dict]:
    out = inputs["start"].parent / name
    out.mkdir()
    return out, average_round(config, inputs, out)


def shift(start: Path, out: Path) -> float:
    before, after = (load_file(f / "adapter_model.safetensors") for f in (start, out))
    return float(torch.cat([(after[k] - before[k]).flatten() for k in before]).mean())


def test_without_momentum_the_step_is_the_mean(make_adapter):
    start = make_adapter("start")
    inputs = {"start": start, "a": moved(start, "a", 1.0), "b": moved(start, "b", 3.0)}
    out, facts = run(MEAN, inputs, "out")
    assert shift(start, out) == pytest.approx(2.0, abs=1e-5)
    assert facts["weights"] == {"a": 0.5, "b": 0.5}
    assert (out / "adapter_config.json").read_bytes() == (start / "adapter_config.json").read_bytes()


def test_workers_count_by_the_tokens_of_this_round(make_adapter):
    start = make_adapter("start", known=provenance(trained_tokens=500))
    inputs = {"start": start, "a": moved(start, "a", 1.0, 600), "b": moved(start, "b", 3.0, 800)}
    out, facts = run(MEAN, inputs, "out")
    assert facts["weights"] == {"a": 0.25, "b": 0.75}
    assert shift(start, out) == pytest.approx(2.5, abs=1e-5)
    assert read_provenance(out).trained_tokens == 500 + 100 + 300


def test_workers_count_the_same_where_that_is_asked_and_domains_by_their_weight(make_adapter):
    start = make_adapter("start", known=provenance(trained_tokens=500))
    inputs = {"start": start, "a": moved(start, "a", 1.0, 600), "b": moved(start, "b", 3.0, 800)}
    config = RoundsConfig(outer=MEAN.outer, weights=MergeWeights.uniform)
    assert run(config, inputs, "uniform")[1]["weights"] == {"a": 0.5, "b": 0.5}
    config = RoundsConfig(outer=MEAN.outer, shard_weights={"a": 3.0})
    assert run(config, inputs, "weighted")[1]["weights"] == {"a": 0.5, "b": 0.5}


def test_the_outer_step_is_pytorchs_nesterov():
    parameter = torch.nn.Parameter(torch.randn(5))
    sgd = torch.optim.SGD([parameter], lr=0.9, momentum=0.5, nesterov=True)
    found, momentum = parameter.detach().clone(), torch.zeros(5)
    for _ in range(4):
        workers = [found + torch.randn(5) for _ in range(3)]
        parameter.grad = parameter.detach() - sum(workers) / 3
        found, momentum = outer_step(found, workers, [1 / 3] * 3, momentum, OuterConfig())
        sgd.step()
        assert torch.allclose(found, parameter.detach(), atol=1e-6)


def test_momentum_goes_on_from_the_folder(make_adapter):
    config = RoundsConfig()
    start = make_adapter("start")
    first, facts = run(config, {"start": start, "a": moved(start, "a", 1.0)}, "first")
    assert facts["round"] == 1
    assert shift(start, first) == pytest.approx(0.9 * 1.5, abs=1e-5)
    shutil.copytree(first, start.parent / "worker")
    second, facts = run(config, {"start": first, "a": start.parent / "worker"}, "second")
    assert facts["round"] == 2
    assert shift(first, second) == pytest.approx(0.9 * 0.25, abs=1e-5)  # g = 0, m = 0.5


def test_the_round_goes_on_without_a_dead_worker_and_says_so(make_adapter, caplog):
    start = make_adapter("start")
    config = RoundsConfig(outer=OuterConfig(learning_rate=1.0, momentum=0.0), workers=["a", "b"])
    out, facts = run(config, {"start": start, "a": moved(start, "a", 1.0)}, "out")
    assert facts["absent"] == ["b"]
    assert json.loads((out / "round.json").read_text())["absent"] == ["b"]
    assert "without b" in caplog.text
    assert shift(start, out) == pytest.approx(1.0, abs=1e-5)


def test_the_last_round_is_the_merge_and_tells_of_all_rounds(make_adapter):
    start = make_adapter("start")
    first, _ = run(RoundsConfig(), {"start": start, "a": moved(start, "a", 1.0), "b": moved(start, "b", 1.0)}, "first")
    workers = {name: moved(first, f"last-{name}", by) for name, by in (("a", 1.0), ("b", 3.0))}
    for folder in workers.values():
        shutil.copytree(first, folder / "start")
    (start.parent / "merged").mkdir()
    facts = merge_adapters(MergedConfig(rounds=RoundsConfig(workers=["a", "b"])), workers, start.parent / "merged")
    assert shift(first, start.parent / "merged") == pytest.approx(0.9 * (2 + 0.5 * (2 + 0.5)), abs=1e-4)
    assert [r["round"] for r in facts["rounds"]] == [1, 2]
    assert {"adapter_config.json", "adapter_model.safetensors", "merge.json", "round.json"} == {
        path.name for path in (start.parent / "merged").iterdir()
    }
    (workers["b"] / "start" / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(ModelError, match="a and b began their last round with different adapters"):
        merge_adapters(MergedConfig(rounds=RoundsConfig(workers=["a", "b"])), workers, start.parent / "merged")


def test_a_round_without_workers_and_one_of_another_start_are_refused(make_adapter):
    start, other = make_adapter("start"), make_adapter("other", r=5)
    with pytest.raises(ModelError, match="No worker"):
        run(MEAN, {"start": start}, "none")
    with pytest.raises(ModelError, match="isn't of this round's start"):
        run(MEAN, {"start": start, "a": other}, "wrong")
