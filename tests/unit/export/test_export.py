"""`python -m qlora_dist.export --to hf`: the same model, bounded memory, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from qlora_dist.export.__main__ import main
from qlora_dist.export.huggingface import Gain, write_model
from qlora_dist.export.nf4 import nf4_round_trip
from qlora_dist.export.weights import MergedWeights
from qlora_dist.model.adapter import Provenance, write_provenance
from qlora_dist.model.peft_folder import PeftFolder
from qlora_dist.model.weights import find_weights, folder_digest

from .conftest import save_adapter, save_model


def run(base, adapter, out, *arguments):
    return main([str(adapter), "--base", str(base), "--out", str(out), *arguments])


def tensors(folder):
    from safetensors.torch import load_file

    return {name: values for file in sorted(folder.glob("*.safetensors")) for name, values in load_file(file).items()}


def known_of(base):
    """Returns what a training on this base would have written."""
    digest = folder_digest(base, ["config.json", *find_weights(base).files])
    return Provenance(
        base_path="/models/theirs", base_revision="", base_digest=digest, tokenizer_digest="t",
        quantization="nf4", dtype="bfloat16", trained_tokens=1,
    )  # fmt: skip


def merged_by_peft(base, adapter):
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


def test_a_full_folder_loads_with_tokenizer_template_and_generation_config(llama, tmp_path):
    import transformers

    base, adapter = llama
    assert run(base, adapter, tmp_path / "out", "--dtype", "f32") == 0
    out = tmp_path / "out"
    assert len(list(out.glob("*.safetensors"))) > 1
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 1
    wanted, found = merged_by_peft(base, adapter), tensors(out)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)
    facts = json.loads((out / "export.json").read_text())
    assert facts["gain"] == pytest.approx(1.0, abs=1e-3)
    assert facts["drift"]["error"] < 1e-5
    assert facts["drift"]["effect"] > 0.1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in found.values())


def test_bfloat16_has_the_right_config_and_its_gain_is_the_share_that_survived(llama, tmp_path):
    base, adapter = llama
    assert run(base, adapter, tmp_path / "out", "--dtype", "bf16") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    stored, was = tensors(tmp_path / "out"), tensors(base)
    with PeftFolder(adapter) as folder:
        for module, values in facts["modules"].items():
            update = folder.factors(module).dense()
            moved = stored[f"{module}.weight"].double() - was[f"{module}.weight"].double()
            assert values["gain"] == pytest.approx(float((moved * update).sum() / update.square().sum()), abs=1e-4)


def test_an_update_below_the_spacing_of_bfloat16_is_reported_as_lost(tmp_path, capsys):
    base = save_model(tmp_path / "base", dtype="bfloat16")
    adapter = save_adapter(tmp_path / "adapter", base, std=2e-4)
    assert run(base, adapter, tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["update_size"] < 5e-3
    assert facts["gain"] < 0.9
    assert "export with --dtype f32" in capsys.readouterr().out
    assert run(base, adapter, tmp_path / "whole", "--dtype", "f32") == 0
    assert json.loads((tmp_path / "whole" / "export.json").read_text())["gain"] > 0.99


def test_the_nf4_base_is_what_four_bit_training_saw(llama, tmp_path):
    base, adapter = llama
    assert run(base, adapter, tmp_path / "out", "--dtype", "f32", "--base-as", "nf4") == 0
    found, was = tensors(tmp_path / "out"), tensors(base)
    with PeftFolder(adapter) as folder:
        for module in folder.modules:
            rounded = nf4_round_trip(was[f"{module}.weight"]).double()
            wanted = rounded + folder.factors(module).dense()
            assert (found[f"{module}.weight"].double() - wanted).norm() <= 1e-6 * wanted.norm()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], was[name])
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["other_base"]["base_as"] == "original"
    assert facts["other_base"]["error"] > 10 * facts["drift"]["error"]


def test_both_bases_are_measured_where_four_bit_training_saw_the_other_one(llama, tmp_path, capsys):
    base, adapter = llama
    shutil.copytree(adapter, tmp_path / "adapter")
    write_provenance(tmp_path / "adapter", known_of(base))
    told = {}
    for base_as in ("original", "nf4"):
        out = tmp_path / base_as
        assert run(base, tmp_path / "adapter", out, "--dtype", "f32", "--base-as", base_as) == 0
        told[base_as] = json.loads((out / "export.json").read_text())
        assert told[base_as]["drift"]["error"] < 1e-3
    assert [told[b]["other_base"]["base_as"] for b in told] == ["nf4", "original"]
    apart = [told[b]["other_base"]["error"] for b in told]
    assert min(apart) > 1e-2
    assert apart[0] == pytest.approx(apart[1], rel=0.5), "as far from each other either way"
    assert "from --base-as nf4 + adapter" in capsys.readouterr().out


def test_nf4_equals_what_transformers_loads_in_four_bits(llama):
    import transformers
    from bitsandbytes.functional import dequantize_4bit

    base, _ = llama
    told = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=told, dtype=torch.bfloat16)
    was, found = tensors(base), 0
    for name, module in loaded.named_modules():
        if type(module).__name__ == "Linear4bit":
            wanted = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(nf4_round_trip(was[f"{name}.weight"]), wanted)
            found += 1
    assert found == 14


def test_what_is_not_adapted_keeps_its_bytes(llama, tmp_path):
    base, adapter = llama
    assert run(base, adapter, tmp_path / "out", "--no-check") == 0
    found, was = tensors(tmp_path / "out"), tensors(base)
    same = {name for name in was if torch.equal(found[name], was[name])}
    assert same == {name for name in was if "embed" in name or "norm" in name or "lm_head" in name}


def test_an_embedding_and_a_whole_head_are_merged_too(tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_adapter(
        tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]
    )
    assert run(base, adapter, tmp_path / "out", "--dtype", "f32") == 0
    wanted, found = merged_by_peft(base, adapter), tensors(tmp_path / "out")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)
    assert not torch.equal(found["lm_head.weight"], tensors(base)["lm_head.weight"])


def test_a_tied_embedding_is_refused(tmp_path, capsys):
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"])
    assert run(base, adapter, tmp_path / "out") == 1
    assert "ties to its other end" in capsys.readouterr().err


def test_a_four_bit_base_is_refused(llama, tmp_path, capsys):
    base, adapter = llama
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert run(tmp_path / "base", adapter, tmp_path / "out") == 1
    assert "bitsandbytes (4-bit)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused_by_its_digest(llama, tmp_path, capsys):
    base, adapter = llama
    shutil.copytree(adapter, tmp_path / "adapter")
    known = known_of(base)
    write_provenance(tmp_path / "adapter", known)
    assert run(base, tmp_path / "adapter", tmp_path / "right", "--no-check") == 0
    write_provenance(tmp_path / "adapter", replace(known, base_digest="0" * 64))
    assert run(base, tmp_path / "adapter", tmp_path / "wrong", "--no-check") == 1
    assert "was trained on /models/theirs" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_an_adapter_of_another_shape_is_refused(llama, tmp_path, capsys):
    _, adapter = llama
    base = save_model(tmp_path / "base", intermediate_size=80)
    assert run(base, adapter, tmp_path / "out") == 1
    assert "of another base" in capsys.readouterr().err


def test_an_export_that_is_another_model_is_not_called_done(llama, tmp_path, capsys, monkeypatch):
    base, adapter = llama

    def lose_the_update(weights, out, dtype):
        gains = write_model(weights, out, dtype)
        for file in weights.files:
            shutil.copyfile(base / file, out / file)
        return gains

    monkeypatch.setattr("qlora_dist.export.run.write_model", lose_the_update)
    assert run(base, adapter, tmp_path / "out") == 1
    assert "from those of base + adapter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_without_a_commit_is_refused_by_the_option(llama, tmp_path, capsys):
    assert run("some/model", llama[1], tmp_path / "out") == 2
    assert "--revision='': expected the full commit sha of some/model" in capsys.readouterr().err


def test_eight_bits_are_for_gguf_alone(llama, tmp_path, capsys):
    base, adapter = llama
    assert run(base, adapter, tmp_path / "out", "--dtype", "q8_0") == 2
    assert "Set --to gguf" in capsys.readouterr().err


def test_an_architecture_that_llama_cpp_names_otherwise_is_refused_by_name(llama, tmp_path, capsys):
    base, adapter = llama
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "gemma3"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert run(tmp_path / "base", adapter, tmp_path / "out.gguf", "--to", "gguf", "--no-check") == 1
    assert "model_type=gemma3: --to gguf knows llama, mistral, qwen2, qwen3" in capsys.readouterr().err


def test_an_unknown_pre_tokenizer_is_refused_with_the_repair(llama, tmp_path, capsys):
    base, adapter = llama
    shutil.copytree(base, tmp_path / "base")
    fields = json.loads((base / "tokenizer.json").read_text())
    fields["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(fields))
    assert run(tmp_path / "base", adapter, tmp_path / "out.gguf", "--to", "gguf", "--no-check") == 1
    assert "--tokenizer-pre" in capsys.readouterr().err
    assert (
        run(tmp_path / "base", adapter, tmp_path / "out.gguf", "--to", "gguf", "--no-check", "--tokenizer-pre", "gpt-2")
        == 0
    )


def test_the_gain_of_a_large_layer_is_measured_on_some_of_its_rows(llama, tmp_path, monkeypatch):
    base, adapter = llama
    told = {}
    for values in (2**18, 2**9):  # all of a layer, and a part of each block
        monkeypatch.setattr("qlora_dist.export.huggingface._MEASURED_VALUES", values)
        out = tmp_path / str(values)
        out.mkdir()
        with PeftFolder(adapter) as folder, MergedWeights(base, folder) as weights:
            told[values] = write_model(weights, out, torch.bfloat16)
    whole, sampled = told.values()
    assert all(sampled[name].energy < whole[name].energy for name in whole)
    assert all(sampled[name].share == pytest.approx(whole[name].share, abs=1e-2) for name in whole)
    a, b = (tensors(tmp_path / str(values)) for values in told)
    assert all(torch.equal(a[name], b[name]) for name in a), "measuring changes nothing"


def test_gains_of_parts_add_up():
    whole = Gain(1.0, 2.0, 8.0) + Gain(1.0, 2.0, 8.0)
    assert whole.share == 0.5
    assert whole.size == 0.5
    assert Gain().share == 1.0


def test_the_result_does_not_depend_on_the_number_of_threads(llama, tmp_path):
    base, adapter = llama
    for workers in (1, 3):
        out = tmp_path / str(workers)
        out.mkdir()
        with PeftFolder(adapter) as folder, MergedWeights(base, folder) as weights:
            write_model(weights, out, torch.bfloat16, workers)
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert all((tmp_path / "1" / n).read_bytes() == (tmp_path / "3" / n).read_bytes() for n in names)
