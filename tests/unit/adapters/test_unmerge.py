"""Taking a part out of an exact merge gives the merge that never had it."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.adapters.merge import merge_adapters
from qlora_dist.adapters.unmerge import main, remove_part
from qlora_dist.config.merge import MergeConfig, MergeMethod, MergeWeights
from qlora_dist.config.stages import MergedConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.adapter import read_provenance

from .conftest import dense, provenance


@pytest.fixture
def folders(make_adapter):
    return {
        label: make_adapter(label, seed=i, r=3 + i, known=provenance(trained_tokens=1000 * (i + 1)))
        for i, label in enumerate(("a", "b", "c"))
    }


def merge(folders, out, **fields):
    out.mkdir()
    given = {"a": 0.5, "b": -0.25, "c": 0.7} if fields.get("weights") is MergeWeights.given else {}
    merge_adapters(MergedConfig(merge=MergeConfig(**fields), shard_weights=given), folders, out)
    return out


@pytest.mark.parametrize("label", ["a", "b", "c"])
def test_given_weights_leave_the_bytes_of_a_merge_that_never_had_the_part(folders, tmp_path, label):
    merged = merge(folders, tmp_path / "merged", weights=MergeWeights.given)
    without = merge({k: v for k, v in folders.items() if k != label}, tmp_path / "without", weights=MergeWeights.given)
    (tmp_path / "left").mkdir()
    remove_part(merged, label, tmp_path / "left")
    for name in ("adapter_model.safetensors", "adapter_config.json", "qlora_dist.json"):
        assert (tmp_path / "left" / name).read_bytes() == (without / name).read_bytes()


def test_token_weights_are_made_to_sum_to_one_again(folders, tmp_path):
    merged = merge(folders, tmp_path / "merged", scale=1.5)
    without = merge({k: folders[k] for k in "ac"}, tmp_path / "without", scale=1.5)
    (tmp_path / "left").mkdir()
    facts = remove_part(merged, "b", tmp_path / "left")
    assert [p["weight"] for p in facts["parts"]] == pytest.approx([0.25, 0.75])
    wanted = dense(without)
    for module, found in dense(tmp_path / "left").items():
        assert (found - wanted[module]).norm() <= 3e-7 * wanted[module].norm()
    assert read_provenance(tmp_path / "left").trained_tokens == 4000


def test_a_second_part_can_follow_and_the_last_can_not(folders, tmp_path):
    merged = merge(folders, tmp_path / "merged")
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    remove_part(merged, "b", tmp_path / "one")
    facts = remove_part(tmp_path / "one", "c", tmp_path / "two")
    assert facts["removed"] == ["b", "c"]
    for module, update in dense(folders["a"]).items():
        assert torch.allclose(dense(tmp_path / "two")[module], update, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="only part"):
        remove_part(tmp_path / "two", "a", tmp_path / "three")


def test_what_can_not_be_taken_out_is_refused(folders, tmp_path, capsys):
    merged = merge(folders, tmp_path / "merged", method=MergeMethod.svd, rank=4)
    assert main([str(merged), "--part", "a", "--out", str(tmp_path / "left")]) == 1
    assert "method svd mixes its parts" in capsys.readouterr().err
    exact = merge(folders, tmp_path / "exact")
    assert main([str(exact), "--part", "d", "--out", str(tmp_path / "left")]) == 1
    assert "has no part d" in capsys.readouterr().err
    assert not (tmp_path / "left").exists()
    assert main([str(exact), "--part", "a", "--out", str(tmp_path / "left")]) == 0
    printed = capsys.readouterr().out
    assert "left: b (0.4), c (0.6); without a" in printed
    assert "next: python -m qlora_dist.export" in printed


def test_the_owner_of_whole_layers_can_not_be_taken_out(folders, make_adapter, tmp_path):
    head = {"base_model.model.lm_head.weight": torch.zeros(2, 3)}
    owner = make_adapter("owner", extra=head, modules_to_save=["lm_head"], known=provenance())
    merged = merge(folders | {"owner": owner}, tmp_path / "merged")
    (tmp_path / "left").mkdir()
    with pytest.raises(ModelError, match="owner brought whole layers"):
        remove_part(merged, "owner", tmp_path / "left")
    remove_part(merged, "a", tmp_path / "left")
    assert "lm_head" in (tmp_path / "left" / "adapter_config.json").read_text()
