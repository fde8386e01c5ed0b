"""RegMean and learned weights as stage `merged` runs them: on a real small base, its rows and trained-like adapters."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_dist.adapters.calibrated import batches_of, completion_loss, target_shares
from qlora_dist.adapters.command import main
from qlora_dist.adapters.merge import merge_adapters
from qlora_dist.adapters.mixture import mixture, read_parts
from qlora_dist.config.merge import LearnedPer, MergeConfig, MergeMethod, MergeWeights
from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import BaseConfig, MergedConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import ModelError
from qlora_dist.model.base import load_model, open_base, prepare_base
from qlora_dist.model.peft_folder import PeftFolder
from qlora_dist.testing import save_rows, save_tiny_model

from .conftest import dense

MODEL = ModelConfig(quantization=Quantization.none, compute_dtype=Dtype.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    model = ModelConfig(
        path=str(save_tiny_model(root / "model")), quantization=MODEL.quantization, compute_dtype=Dtype.float32
    )
    (root / "base").mkdir()
    prepare_base(BaseConfig(model=model), {}, root / "base")
    return root / "base"


@pytest.fixture
def inputs(base, make_adapter, tmp_path):
    """Two adapters, the second of them pure noise, and rows of each."""
    shapes = {f"model.layers.{n}.self_attn.v_proj": (32, 64) for n in range(2)}
    found = {"base": base}
    for i, label in enumerate(("good", "noise")):
        found[label] = make_adapter(label, seed=i, shapes=shapes, lora_alpha=0.02 if label == "good" else 2)
        found[f"rows-{label}"] = save_rows(tmp_path / f"rows-{label}", num_rows=6, seed=i)
    return found


def merge(inputs, out, **fields):
    out.mkdir()
    config = MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform, **fields), model=MODEL)
    return merge_adapters(config, inputs, out)


def loss_of(inputs, weights):
    model = load_model(open_base(inputs["base"]), MODEL)
    batches = [b for name in ("rows-good", "rows-noise") for b in batches_of(Rows.open(inputs[name]), 32, 0)]
    with PeftFolder(inputs["good"]) as a, PeftFolder(inputs["noise"]) as b:
        parts = read_parts([a, b])
    with torch.no_grad(), mixture(model, parts, torch.tensor(weights)):
        return sum(float(completion_loss(model, batch)) for batch in batches)


def test_learned_weights_are_better_than_the_mean_and_written(inputs, tmp_path):
    facts = merge(inputs, tmp_path / "out", method=MergeMethod.learned, steps=25)
    weights = [part["weight"] for part in facts["parts"]]
    assert loss_of(inputs, weights) < loss_of(inputs, [0.5, 0.5])
    wanted = [dense(inputs[label]) for label in ("good", "noise")]
    for module, found in dense(tmp_path / "out").items():
        update = sum(w * parts[module] for w, parts in zip(weights, wanted, strict=True))
        assert (found - update).norm() <= 1e-5 * update.norm()


def test_weights_may_be_learned_for_each_module_and_each_is_written(inputs, tmp_path):
    facts = merge(inputs, tmp_path / "out", method=MergeMethod.learned, steps=25, learned_per=LearnedPer.module)
    modules = json.loads((tmp_path / "out" / "merge.json").read_text())["modules"]
    weights_MP = [told["weights"] for told in modules.values()]
    assert weights_MP[0] != weights_MP[1], "each module has its own"
    assert loss_of(inputs, weights_MP) < loss_of(inputs, [0.5, 0.5])
    wanted = [dense(inputs[label]) for label in ("good", "noise")]
    found = dense(tmp_path / "out")
    apart = 0.0
    for module, weights in zip(modules, weights_MP, strict=True):
        parts = [w * updates[module] for w, updates in zip(weights, wanted, strict=True)]
        assert (found[module] - sum(parts)).norm() <= 1e-5 * sum(parts).norm()
        apart += float(sum(part.square().sum() for part in parts))
    means = [sum(column) / 2 for column in zip(*weights_MP, strict=True)]
    assert [part["weight"] for part in facts["parts"]] == pytest.approx(means)
    assert facts["cross_energy"] == pytest.approx(facts["norm"] ** 2 / apart - 1, rel=1e-4)


def test_a_soup_keeps_what_lowers_the_loss_and_drops_the_rest(inputs, tmp_path, capsys):
    alone = [loss_of(inputs, [1.0, 0.0]), loss_of(inputs, [0.0, 1.0])]
    both, best = loss_of(inputs, [0.5, 0.5]), min(alone)
    wanted = ["good", "noise"] if both < best else [("good", "noise")[alone.index(best)]]
    facts = merge(inputs, tmp_path / "out", method=MergeMethod.greedy_soup)
    assert [part["label"] for part in facts["parts"]] == wanted
    assert [part["weight"] for part in facts["parts"]] == [1 / len(wanted)] * len(wanted)
    assert facts["lora_rank"] == 4 * len(wanted)
    given = ["--base", str(inputs["base"]), "--rows", str(inputs["rows-good"]), "--weights", "uniform"]
    folders = [str(inputs[label]) for label in ("good", "noise")]
    assert main([*folders, "--method", "greedy_soup", *given, "--out", str(tmp_path / "told")]) == 0
    assert "greedy_soup" in capsys.readouterr().out


def test_regmean_runs_the_base_and_keeps_the_rank_of_the_sum(inputs, tmp_path):
    facts = merge(inputs, tmp_path / "out", method=MergeMethod.regmean, calibration_rows=4)
    assert [part["label"] for part in facts["parts"]] == ["good", "noise"]
    assert facts["lora_rank"] == 8
    (tmp_path / "mean").mkdir()
    mean = MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform))
    merge_adapters(mean, {label: inputs[label] for label in ("good", "noise")}, tmp_path / "mean")
    found, plain = dense(tmp_path / "out"), dense(tmp_path / "mean")
    assert all((found[m] - plain[m]).norm() > 1e-3 * plain[m].norm() for m in found)


def test_memory_for_gram_matrices_is_bounded_by_more_passes(inputs, tmp_path, monkeypatch):
    one = merge(inputs, tmp_path / "one", method=MergeMethod.regmean, calibration_rows=4)
    monkeypatch.setattr("qlora_dist.adapters.calibrated._GRAM_BYTES", 1)
    many = merge(inputs, tmp_path / "many", method=MergeMethod.regmean, calibration_rows=4)
    assert one["norm"] == pytest.approx(many["norm"], rel=1e-5)


def test_what_they_need_is_named_when_it_is_not_there(inputs, tmp_path):
    del inputs["rows-noise"]
    with pytest.raises(ModelError, match=r"method learned needs .*; rows-noise isn't there"):
        merge(inputs, tmp_path / "out", method=MergeMethod.learned)


def test_batches_weigh_as_many_targets_as_they_have(inputs):
    rows = Rows.open(inputs["rows-good"])
    batches = batches_of(rows, 6, 0)
    short = {name: value[:1] for name, value in batches[0].items()}
    first, second = (int(b["trained"][:, 1:].sum()) for b in (batches[0], short))
    assert target_shares([batches[0], short]) == [first / (first + second), second / (first + second)]
