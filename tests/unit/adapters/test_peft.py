"""PEFT beside this room on the same adapters: what it gets wrong is right here, and it loads what is written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_dist.adapters.merge import merge_adapters
from qlora_dist.config.merge import MergeConfig, MergeMethod, MergeWeights
from qlora_dist.config.stages import MergedConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.peft_folder import PeftFolder

peft = pytest.importorskip("peft")
WIDTH = 96


class TwoLayers(torch.nn.Module):
    """A base that PEFT can adapt without a download."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH, bias=bias)
        self.second = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=bias)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x_BI))


def peft_model(num_adapters: int, tmp_path: Path, **fields: object) -> tuple[peft.PeftModel, dict[str, Path]]:
    """Returns a PEFT model with independent random adapters, and their saved folders."""
    torch.manual_seed(0)
    ranks, base, model = fields.pop("ranks", [8] * num_adapters), fields.pop("base", None), None
    for i, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["first", "second"], **fields)
        if model is None:
            model = peft.PeftModel(base or TwoLayers(), config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
    for name, values in model.named_parameters():
        if "lora_B" in name:
            values.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "parts"))
    return model, {str(i): tmp_path / "parts" / str(i) for i in range(num_adapters)}


def updates_of(model: peft.PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    layers = {"first": model.base_model.model.first, "second": model.base_model.model.second}
    return {name: layer.get_delta_weight(adapter).detach().double() for name, layer in layers.items()}


def wanted_of(model: peft.PeftModel, weights: list[float]) -> dict[str, torch.Tensor]:
    parts = [updates_of(model, str(i)) for i in range(len(weights))]
    return {name: sum(w * p[name] for w, p in zip(weights, parts, strict=True)) for name in parts[0]}


def ours(folders: dict[str, Path], weights: list[float], out: Path, **fields: object) -> dict[str, torch.Tensor]:
    """Returns our merge's updates as *PEFT* applies them after loading the folder."""
    out.mkdir()
    config = MergeConfig(weights=MergeWeights.given, **fields)
    merge_adapters(MergedConfig(merge=config, shard_weights=dict(zip(folders, weights, strict=True))), folders, out)
    loaded = peft.PeftModel.from_pretrained(TwoLayers(), str(out))
    return updates_of(loaded, "default")


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.mark.parametrize(("num_adapters", "least"), [(2, 0.9), (4, 1.5), (8, 2.2)])
def test_pefts_linear_adds_cross_terms_and_ours_does_not(tmp_path, num_adapters, least):
    weights = [1.0] * num_adapters
    model, folders = peft_model(num_adapters, tmp_path)
    model.add_weighted_adapter(list(folders), weights, "merged", combination_type="linear")
    assert error(updates_of(model, "merged"), wanted_of(model, weights)) > least
    assert error(ours(folders, weights, tmp_path / "out"), wanted_of(model, weights)) < 1e-6


def test_pefts_linear_of_a_shared_start_is_n_times_too_large(tmp_path):
    model, folders = peft_model(4, tmp_path)
    for name, values in model.named_parameters():
        if "lora_A" in name:
            values.data.copy_(dict(model.named_parameters())[name.replace(name.split(".")[-2], "0")].data)
    model.save_pretrained(str(tmp_path / "parts"))
    weights = [0.25] * 4
    model.add_weighted_adapter(list(folders), weights, "merged", combination_type="linear")
    wanted = wanted_of(model, weights)
    four_times = {name: 4 * update for name, update in wanted.items()}
    assert error(updates_of(model, "merged"), four_times) < 1e-5
    assert error(ours(folders, weights, tmp_path / "out"), wanted) < 1e-6


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_scales_merges_of_rslora_wrongly_and_ours_does_not(tmp_path, kind):
    weights = [0.5, 0.5]
    model, folders = peft_model(2, tmp_path, use_rslora=True)
    model.add_weighted_adapter(list(folders), weights, "merged", combination_type=kind, svd_rank=16)
    wanted = wanted_of(model, weights)
    too_large = {name: 4 * update for name, update in wanted.items()}  # √16: its config keeps use_rslora
    assert error(updates_of(model, "merged"), too_large) < 1e-4
    assert error(ours(folders, weights, tmp_path / "out"), wanted) < 1e-6


def test_peft_merges_dora_in_silence_and_wrongly_and_ours_refuses_it_by_name(tmp_path):
    model, folders = peft_model(2, tmp_path, use_dora=True)
    for name, values in model.named_parameters():
        if "lora_magnitude_vector" in name:
            values.data.mul_(1.5)
    model.save_pretrained(str(tmp_path / "parts"))
    x_BI, parts = torch.randn(8, WIDTH), []
    with torch.no_grad():
        for adapter in folders:
            model.set_adapter(adapter)
            parts.append(model(x_BI))
        model.add_weighted_adapter(list(folders), [0.0, 1.0], "merged", combination_type="cat")
        model.set_adapter("merged")
        found = model(x_BI)
    assert (found - parts[1]).norm() > 0.1 * parts[1].norm(), "one adapter alone, weighted 1, is another one afterwards"
    with pytest.raises(ModelError, match="use_dora=True: the adapter has DoRA"):
        ours(folders, [0.0, 1.0], tmp_path / "out")


def test_peft_loses_biases_in_silence_and_ours_refuses_them_by_name(tmp_path):
    model, folders = peft_model(2, tmp_path, base=TwoLayers(bias=True), lora_bias=True)
    for name, values in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            values.data.add_(1.0)
    model.save_pretrained(str(tmp_path / "parts"))
    x_BI = torch.randn(8, WIDTH)
    with torch.no_grad():
        model.set_adapter("1")
        wanted = model(x_BI)
        model.add_weighted_adapter(list(folders), [0.0, 1.0], "merged", combination_type="cat")
        model.set_adapter("merged")
        found = model(x_BI)
    assert (found - wanted).norm() > 0.05 * wanted.norm()
    with pytest.raises(ModelError, match="lora_bias=True: the adapter has a bias on lora_B"):
        ours(folders, [0.0, 1.0], tmp_path / "out")


def test_pefts_linear_refuses_unequal_ranks_and_ours_sums_them(tmp_path):
    model, folders = peft_model(2, tmp_path, ranks=[8, 5])
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(list(folders), [0.5, 0.5], "merged", combination_type="linear")
    assert error(ours(folders, [0.5, 0.5], tmp_path / "out"), wanted_of(model, [0.5, 0.5])) < 1e-6


def test_patterns_are_read_as_peft_reads_them(tmp_path):
    patterns = {"rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}}
    model, folders = peft_model(2, tmp_path, **patterns)
    with PeftFolder(folders["0"]) as adapter:
        assert {m: adapter.rank(m) for m in adapter.modules} == {"first": 3, "second": 8}
        assert {m: adapter.scale(m) for m in adapter.modules} == {"first": 16 / 3, "second": 5 / 8}
    assert error(ours(folders, [0.75, 0.25], tmp_path / "out"), wanted_of(model, [0.75, 0.25])) < 1e-6


class Nested(torch.nn.Module):
    """A base in which one layer's name ends another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.block = TwoLayers()


def test_peft_reads_the_ranks_of_layers_whose_names_end_other_names(tmp_path):
    torch.manual_seed(0)
    told = {"r": 8, "target_modules": ["first", "second"], "rank_pattern": {"^first": 2}}
    model = peft.get_peft_model(Nested(), peft.LoraConfig(**told))
    for values in (v for name, v in model.named_parameters() if "lora_B" in name):
        values.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "a"))
    (tmp_path / "out").mkdir()
    merge_adapters(
        MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform)), {"a": tmp_path / "a"}, tmp_path / "out"
    )
    loaded = peft.PeftModel.from_pretrained(Nested(), str(tmp_path / "out"))
    for name in ("first", "block.first", "block.second"):
        found, wanted = (m.base_model.model.get_submodule(name).get_delta_weight("default") for m in (loaded, model))
        assert torch.allclose(found, wanted, atol=1e-6)
    with PeftFolder(tmp_path / "out") as merged:
        assert [merged.scale(module) for module in merged.modules] == [1.0] * 3


def test_a_cut_equals_pefts_svd(tmp_path):
    weights = [0.6, 0.4]
    model, folders = peft_model(2, tmp_path)
    model.add_weighted_adapter(list(folders), weights, "merged", combination_type="svd", svd_rank=8)
    found = ours(folders, weights, tmp_path / "out", method=MergeMethod.svd, rank=8)
    assert error(found, updates_of(model, "merged")) < 1e-5


def test_modules_of_unequal_ranks_come_back_through_peft(tmp_path):
    model, folders = peft_model(3, tmp_path, rank_pattern={"first": 2})
    found = ours(folders, [0.2, 0.3, 0.5], tmp_path / "out", method=MergeMethod.svd, energy=0.99999999)
    assert error(found, wanted_of(model, [0.2, 0.3, 0.5])) < 2e-4
