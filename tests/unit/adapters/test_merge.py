"""The stage `merged`: what it writes is the weighted sum, and what can't be summed is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qlora_dist.adapters.merge import merge_adapters
from qlora_dist.adapters.parts import merge_part
from qlora_dist.adapters.scaled import rescale
from qlora_dist.config.merge import MergeConfig, MergeMethod, MergeWeights
from qlora_dist.config.stages import MergedConfig, MergedPartConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.model.adapter import read_provenance
from qlora_dist.model.peft_folder import PeftFolder

from .conftest import dense, provenance


def test_the_sum_is_exact_over_unequal_ranks_scales_and_patterns(make_adapter, tmp_path):
    q_proj = "model.layers.0.self_attn.q_proj"
    folders = {
        "plain": make_adapter("plain", seed=1, known=provenance(trained_tokens=100)),
        "rslora": make_adapter("rslora", seed=2, r=9, use_rslora=True, known=provenance(trained_tokens=300)),
        "patterns": make_adapter(
            "patterns",
            seed=3,
            ranks={q_proj: 2},
            rank_pattern={"self_attn.q_proj": 2},
            alpha_pattern={"q_proj": 5},
            known=provenance(trained_tokens=400),
        ),
    }
    out = tmp_path / "out"
    out.mkdir()
    config = MergedConfig(merge=MergeConfig(scale=1.5), shard_weights={"plain": 2.0})
    facts = merge_adapters(config, folders, out)

    weights = {"plain": 200 / 900, "rslora": 300 / 900, "patterns": 400 / 900}
    assert {p["label"]: p["weight"] for p in facts["parts"]} == pytest.approx(weights)
    merged = dense(out)
    for module, found in merged.items():
        wanted = sum(1.5 * weights[label] * dense(folder)[module] for label, folder in folders.items())
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["use_rslora"] is False
    assert written["lora_alpha"] == written["r"]
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert facts["lora_rank"] == 17


def test_facts_hold_norms_and_cosines_of_the_dense_updates(make_adapter, tmp_path):
    folders = {"a": make_adapter("a", seed=1), "b": make_adapter("b", seed=2, lora_alpha=3)}
    (tmp_path / "out").mkdir()
    config = MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform))
    facts = merge_adapters(config, folders, tmp_path / "out")
    a, b = (torch.cat([x.flatten() for x in dense(folder).values()]) for folder in folders.values())
    assert [p["norm"] for p in facts["parts"]] == pytest.approx([float(a.norm()), float(b.norm())])
    assert facts["cosines"][0][1] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert facts["norm"] == pytest.approx(float((a / 2 + b / 2).norm()))


def test_the_same_parts_give_the_same_bytes_and_leftovers_are_replaced(make_adapter, tmp_path):
    folders = {"a": make_adapter("a", seed=1), "b": make_adapter("b", seed=2)}
    config = MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform))
    bytes_of = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        (out / "adapter_model.safetensors").write_bytes(b"half a file")
        merge_adapters(config, folders, out)
        bytes_of.append({p.name: p.read_bytes() for p in sorted(out.iterdir())})
    assert bytes_of[0] == bytes_of[1]
    assert sorted(bytes_of[0]) == ["adapter_config.json", "adapter_model.safetensors", "merge.json"]


@pytest.mark.parametrize("num_parts", [2, 5])
@pytest.mark.parametrize("fields", [{}, {"method": MergeMethod.ties, "rank": 3}, {"method": MergeMethod.knots_ties}])
def test_a_merge_divided_over_nodes_has_the_bytes_of_the_undivided_one(make_adapter, tmp_path, num_parts, fields):
    shapes = {f"model.layers.{i}.mlp.down_proj": (10, 16 + i) for i in range(4)}
    folders = {n: make_adapter(n, seed=i, shapes=shapes, known=provenance()) for i, n in enumerate("abc")}
    merge = MergeConfig(scale=1.5, **fields)
    parts, whole, joined = {}, tmp_path / "whole", tmp_path / "joined"
    for part in range(num_parts):
        out = parts[f"merged_part-{part}"] = tmp_path / f"part-{part}"
        out.mkdir()
        merge_part(MergedPartConfig(merge=merge, part=part, num_parts=num_parts), folders, out)
    for out, inputs in ((whole, folders), (joined, folders | parts)):
        out.mkdir()
        merge_adapters(MergedConfig(merge=merge), inputs, out)
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in joined.iterdir())
    assert all((whole / n).read_bytes() == (joined / n).read_bytes() for n in names)


def test_a_merge_rescaled_is_the_merge_of_that_scale(make_adapter, tmp_path):
    head = {"base_model.model.lm_head.weight": torch.arange(6.0).reshape(2, 3)}
    folders = {n: make_adapter(n, seed=i, known=provenance()) for i, n in enumerate("ab")}
    folders["c"] = make_adapter("c", extra=head, modules_to_save=["lm_head"], known=provenance())
    outs = {name: tmp_path / name for name in ("first", "rescaled", "direct")}
    for out in outs.values():
        out.mkdir()
    merge_adapters(MergedConfig(merge=MergeConfig(scale=1.25)), folders, outs["first"])
    found = rescale(outs["first"], 2.0, outs["rescaled"])
    wanted = merge_adapters(MergedConfig(merge=MergeConfig(scale=2.0)), folders, outs["direct"])
    assert found.pop("norm") == pytest.approx(wanted.pop("norm"))
    assert found.pop("energy_kept") == pytest.approx(wanted.pop("energy_kept"))
    assert found.pop("spectrum") == pytest.approx(wanted.pop("spectrum"))
    assert found == wanted
    for module, update in dense(outs["direct"]).items():
        assert (dense(outs["rescaled"])[module] - update).norm() <= 3e-7 * update.norm()
    configs = [json.loads((outs[n] / "adapter_config.json").read_text()) for n in ("rescaled", "direct")]
    assert configs[0] == configs[1]
    with safe_open(outs["rescaled"] / "adapter_model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("base_model.model.lm_head.weight"), head["base_model.model.lm_head.weight"])


def test_memory_holds_a_few_modules_whatever_their_number(make_adapter, tmp_path, monkeypatch):
    shapes = {f"model.layers.{i}.mlp.down_proj": (10, 16) for i in range(30)}
    folders = {n: make_adapter(n, seed=i, shapes=shapes, known=provenance()) for i, n in enumerate("abc")}
    alive, most, read = [0], [0], PeftFolder.factors

    def counted(self, module):
        factors = read(self, module)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(factors.A_RI, lambda: alive.__setitem__(0, alive[0] - 1))
        return factors

    monkeypatch.setattr(PeftFolder, "factors", counted)
    (tmp_path / "out").mkdir()
    merge_adapters(
        MergedConfig(merge=MergeConfig(method=MergeMethod.svd, rank=2, workers=2)), folders, tmp_path / "out"
    )
    assert 3 <= most[0] <= 3 * 3, "of three adapters, those of the modules that two threads work on and one ahead"


def test_the_joint_provenance_counts_all_tokens(make_adapter, tmp_path):
    folders = {n: make_adapter(n, known=provenance(trained_tokens=t)) for n, t in (("a", 5), ("b", 7))}
    (tmp_path / "out").mkdir()
    merge_adapters(MergedConfig(), folders, tmp_path / "out")
    assert read_provenance(tmp_path / "out").trained_tokens == 12


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_layer_that_one_adapter_brings_whole_is_carried_over(make_adapter, tmp_path, order):
    head = {"base_model.model.lm_head.weight": torch.arange(6.0).reshape(2, 3)}
    folders = {"a": make_adapter("a", extra=head, modules_to_save=["lm_head"]), "b": make_adapter("b", seed=1)}
    folders = {label: folders[label] for label in order}
    (tmp_path / "out").mkdir()
    merge_adapters(MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform)), folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("base_model.model.lm_head.weight"), head["base_model.model.lm_head.weight"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"known": provenance(base_digest="c" * 64)}, "another base: "),
        ({"known": provenance(tokenizer_digest="u" * 64)}, "another tokenizer: "),
        ({"revision": "2" * 40}, "another revision: a has 1111"),
        ({"known": provenance(), "shapes": {"model.layers.0.self_attn.q_proj": (12, 10)}}, "down_proj"),
        (
            {
                "known": provenance(),
                "shapes": {"model.layers.0.self_attn.q_proj": (12, 10), "model.layers.0.mlp.down_proj": (10, 23)},
            },
            "another shape of model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_difference(make_adapter, tmp_path, other, message):
    folders = {"a": make_adapter("a", known=provenance(base_revision="1" * 40)), "b": make_adapter("b", **other)}
    with pytest.raises(ModelError, match=message):
        merge_adapters(MergedConfig(), folders, tmp_path)


def test_adapters_beside_which_other_tokenizers_lie_are_refused(make_adapter, tmp_path):
    folders = {n: make_adapter(n, seed=i, known=provenance()) for i, n in enumerate("ab")}
    fields = {"model": {"type": "BPE", "vocab": {"x": 0, "y": 1}}, "added_tokens": [{"id": 2, "content": "<s>"}]}
    (folders["a"] / "tokenizer.json").write_text(json.dumps(fields))
    (folders["b"] / "tokenizer.json").write_text(json.dumps(fields | {"version": "1.0"}, indent=1))
    (tmp_path / "out").mkdir()
    merge_adapters(MergedConfig(), folders, tmp_path / "out")
    (folders["b"] / "tokenizer.json").write_text(json.dumps(fields | {"added_tokens": []}))
    with pytest.raises(ModelError, match=r"a and b can't be merged: another tokenizer: .*a/tokenizer\.json"):
        merge_adapters(MergedConfig(), folders, tmp_path / "out")


def test_a_slash_at_the_end_makes_no_other_base(make_adapter, tmp_path):
    folders = {"a": make_adapter("a"), "b": make_adapter("b", base_model_name_or_path="/models/base/")}
    config = MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform))
    (tmp_path / "out").mkdir()
    merge_adapters(config, folders, tmp_path / "out")


def test_an_adapter_that_names_no_base_is_announced(make_adapter, tmp_path, caplog):
    folders = {"a": make_adapter("a"), "b": make_adapter("b", base_model_name_or_path=None)}
    config = MergedConfig(merge=MergeConfig(weights=MergeWeights.uniform))
    (tmp_path / "out").mkdir()
    merge_adapters(config, folders, tmp_path / "out")
    assert "b: no base_model_name_or_path" in caplog.text


def test_foreign_adapters_of_another_base_are_refused_by_its_name(make_adapter, tmp_path):
    folders = {"a": make_adapter("a"), "b": make_adapter("b", base_model_name_or_path="/models/other")}
    found = r"another base_model_name_or_path: a has /models/base, b has /models/other .*write the same"
    with pytest.raises(ModelError, match=found):
        merge_adapters(MergedConfig(), folders, tmp_path)
    folders["a"] = make_adapter("ours", known=provenance())
    with pytest.raises(ModelError, match=found):
        merge_adapters(MergedConfig(), folders, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "a bias on lora_B"),
        ({"bias": "lora_only"}, "biases of the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq"),
        ({"init_lora_weights": "corda"}, "init_lora_weights=corda"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "expert weights"),
        ({"peft_type": "IA3"}, "expected LORA"),
        ({"r": 5}, "The two files are not of one adapter"),
        ({"r": None}, "r=None: expected a number above 0"),
        ({"lora_alpha": None}, "lora_alpha=None: expected a number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj=x: expected a number"),
        ({"rank_pattern": {"[q": 4}}, r"rank_pattern: \[q: expected regular expressions"),
        ({"rank_pattern": [4]}, "rank_pattern=.* expected an object"),
    ],
)
def test_what_is_no_plain_sum_is_refused_by_name(make_adapter, tmp_path, config, message):
    ranks = dict.fromkeys(("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"), 4)
    folder = make_adapter("a", ranks=ranks, known=provenance(), **config)
    with pytest.raises(ModelError, match=message):
        merge_adapters(MergedConfig(), {"a": folder}, tmp_path)


def test_a_tensor_of_an_unknown_kind_of_lora_is_refused_by_its_name(make_adapter, tmp_path):
    extra = {"base_model.model.model.layers.0.mlp.down_proj.lora_new_gate": torch.ones(4)}
    with pytest.raises(ModelError, match=r"down_proj\.lora_new_gate is no factor A or B"):
        merge_adapters(MergedConfig(), {"a": make_adapter("a", extra=extra, known=provenance())}, tmp_path)


def test_whole_layers_of_two_adapters_are_refused(make_adapter, tmp_path):
    head = "base_model.model.lm_head.weight"
    folders = {n: make_adapter(n, extra={head: torch.full((2, 3), i)}, known=provenance()) for i, n in enumerate("ab")}
    with pytest.raises(ModelError, match="a, b each bring whole layers"):
        merge_adapters(MergedConfig(), folders, tmp_path)


def test_equal_whole_layers_of_two_adapters_are_one(make_adapter, tmp_path):
    head = {"base_model.model.lm_head.weight": torch.arange(6.0).reshape(2, 3)}
    folders = {n: make_adapter(n, extra=head, known=provenance()) for n in ("a", "b")}
    (tmp_path / "out").mkdir()
    merge_adapters(MergedConfig(), folders, tmp_path / "out")
    with PeftFolder(tmp_path / "out") as merged:
        assert torch.equal(merged.file.read(merged.saved_modules[0]), head["base_model.model.lm_head.weight"])


def test_copies_of_the_base_are_carried_along_and_must_be_of_one_base(make_adapter, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    copy = torch.arange(120.0).reshape(12, 10) / 7
    told = {"a": {}, "b": {key: copy}, "c": {key: copy.bfloat16()}, "d": {key: copy + 1}}
    folders = {n: make_adapter(n, extra=extra, known=provenance()) for n, extra in told.items()}
    (tmp_path / "out").mkdir()
    merge_adapters(MergedConfig(), {n: folders[n] for n in "abc"}, tmp_path / "out")
    with PeftFolder(tmp_path / "out") as merged:
        assert merged.saved_modules == []
        assert list(merged.base_copies) == ["model.layers.0.self_attn.q_proj.weight"]
        assert torch.equal(merged.file.read(key), copy)
    with pytest.raises(ModelError, match="b and d can't be merged: another base: the copies of model"):
        merge_adapters(MergedConfig(), {n: folders[n] for n in "bd"}, tmp_path)


def test_token_weights_of_a_foreign_adapter_are_refused_with_the_repair(make_adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"Set merge\.weights=uniform"):
        merge_adapters(MergedConfig(), {"a": make_adapter("a")}, tmp_path)


def test_values_that_are_not_finite_are_refused(make_adapter, tmp_path):
    folder = make_adapter("a", known=provenance())
    bad = make_adapter("b", known=provenance(), dtype=torch.float16, lora_alpha=8)
    data = bytearray((bad / "adapter_model.safetensors").read_bytes())
    data[-2:] = b"\x00\x7e"
    (bad / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="NaN"):
        merge_adapters(MergedConfig(), {"a": folder, "b": bad}, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_torn_file_is_refused(make_adapter, tmp_path: Path):
    folder = make_adapter("a", known=provenance())
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="torn"):
        merge_adapters(MergedConfig(), {"a": folder}, tmp_path)


def test_merging_imports_neither_transformers_nor_peft():
    heavy = "{'transformers', 'peft', 'datasets'}"
    code = f"import sys, qlora_dist.adapters.merge; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
