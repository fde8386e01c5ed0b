"""What a base is decides what is written: tied ends, layers held as I×O, dtypes of its own, files with other names."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.export.__main__ import main

from .conftest import TEXT, save_adapter, save_model, save_tokenizer

WEIGHTS = "model.safetensors"


def run(base, adapter, out, *arguments):
    return main([str(adapter), "--base", str(base), "--out", str(out), *arguments])


def logits(folder, adapter=None):
    """Returns what transformers, and PEFT with an adapter, makes of a text, in float32."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def changed(base, out, change):
    """Returns a copy of a base whose weights went through a function."""
    shutil.copytree(base, out)
    save_file(change(load_file(base / WEIGHTS)), out / WEIGHTS, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    base = save_model(root / "base")
    return base, save_adapter(root / "adapter", base, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_pefts_copy_of_the_base_is_no_layer_that_an_adapter_brings(plain, tmp_path, target):
    base, _ = plain
    adapter = save_adapter(tmp_path / "a", base, target_modules=["q_proj", target], with_copies=True)
    key = next(k for k in load_file(adapter / "adapter_model.safetensors") if k.endswith("base_layer.weight"))
    assert run(base, adapter, tmp_path / "out", "--no-check") == 0
    assert torch.allclose(logits(tmp_path / "out"), logits(base, adapter), atol=1e-4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {key: tensors[key] + 1}, adapter / "adapter_model.safetensors")
    assert run(base, adapter, tmp_path / "other") == 1


def test_another_copy_of_the_base_is_refused_by_its_name(plain, tmp_path, capsys):
    base, _ = plain
    adapter = save_adapter(tmp_path / "a", base, target_modules=["lm_head"], with_copies=True)
    other = changed(base, tmp_path / "base", lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    assert run(other, adapter, tmp_path / "out") == 1
    assert "was saved with a lm_head.weight of its own, which isn't that of" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_an_end_of_a_tied_base_that_an_adapter_brings_makes_two_weights_of_it(tied, tmp_path, caplog, saved):
    adapter = save_adapter(tmp_path / "a", tied, target_modules=["q_proj"], modules_to_save=saved)
    if len(saved) == 2:
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors["base_model.model.lm_head.weight"] *= 1.5
        save_file(tensors, adapter / "adapter_model.safetensors")
    assert run(tied, adapter, tmp_path / "out", "--no-check") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.allclose(logits(tmp_path / "out"), logits(tied, adapter), atol=1e-4)
    assert "what the base ties is written as two weights" in caplog.text
    assert run(tied, adapter, tmp_path / "out.gguf", "--to", "gguf") == 0, "checked against base + adapter"


def test_an_untied_head_stands_in_the_index(tmp_path):
    base = save_model(tmp_path / "base", shards=True, tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "a", base, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert run(base, adapter, tmp_path / "out") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert set(index["weight_map"]) == held
    assert "lm_head.weight" in held


def test_equal_ends_of_a_tied_base_stay_one(tied, tmp_path):
    adapter = save_adapter(
        tmp_path / "a", tied, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    assert "base_model.model.lm_head.weight" in load_file(adapter / "adapter_model.safetensors")
    assert run(tied, adapter, tmp_path / "out", "--no-check") == 0
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    assert torch.allclose(logits(tmp_path / "out"), logits(tied, adapter), atol=1e-4)


def test_a_tie_that_the_class_makes_and_the_config_doesnt_name_is_known(tmp_path, capsys):
    base = save_model(tmp_path / "base", "gemma", head_dim=16)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(tmp_path / "a", base, target_modules=["embed_tokens"])
    assert run(base, adapter, tmp_path / "out", "--no-check") == 1
    assert "ties to its other end" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [True, False])
def test_a_layers_class_says_how_its_weight_is_held_and_not_the_adapters_flag(plain, tmp_path, flag):
    bases = {"o_proj": plain[0], "attn.c_proj": save_model(tmp_path / "base", "gpt2")}  # square both
    for target, base in bases.items():
        adapter = save_adapter(tmp_path / target, base, target_modules=[target])
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": flag}))
        assert run(base, adapter, tmp_path / f"{target}-out", "--no-check") == 0
        wanted = logits(base, adapter)
        assert torch.allclose(logits(tmp_path / f"{target}-out"), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_a_tensor_of_one_value_is_written(plain, tmp_path):
    base, adapter = plain
    single = {"model.scale": torch.tensor(3.0), "model.count": torch.tensor(5)}
    base = changed(base, tmp_path / "base", lambda t: t | single)
    assert run(base, adapter, tmp_path / "out", "--dtype", "bf16") == 0
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(found["model.scale"], torch.tensor(3.0, dtype=torch.bfloat16))
    assert torch.equal(found["model.count"], single["model.count"])


def test_files_that_name_weights_otherwise_than_the_class_are_refused_by_its_name(tmp_path, capsys):
    import transformers

    text = {"vocab_size": 430, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "a", tmp_path / "base", target_modules=["q_proj"])
    assert run(tmp_path / "base", adapter, tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "Gemma3ForConditionalGeneration names its weights otherwise in its files" in told
    assert "Another base?" not in told


def test_without_a_dtype_each_weight_keeps_its_own(plain, tmp_path):
    base, adapter = plain
    base = changed(base, tmp_path / "base", lambda t: {n: v if "norm" in n else v.bfloat16() for n, v in t.items()})
    assert run(base, adapter, tmp_path / "out") == 0
    was, found = (load_file(folder / WEIGHTS) for folder in (base, tmp_path / "out"))
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in was.items()}
    assert json.loads((tmp_path / "out" / "export.json").read_text())["dtype"] == "bf16+f32"


def test_a_base_of_float64_needs_a_dtype(plain, tmp_path, capsys):
    base, adapter = plain
    base = changed(base, tmp_path / "base", lambda t: {n: v.double() for n, v in t.items()})
    assert run(base, adapter, tmp_path / "out") == 2
    assert "has weights of float64. Set --dtype f32." in capsys.readouterr().err
    assert run(base, adapter, tmp_path / "out", "--dtype", "f32") == 0


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_values_beyond_float16_are_refused_even_unchecked(plain, tmp_path, capsys, to):
    base, adapter = plain
    base = changed(base, tmp_path / "base", lambda t: {n: v * 1e6 if "up_proj" in n else v for n, v in t.items()})
    assert run(base, adapter, tmp_path / "out", "--dtype", "f16", "--to", to, "--no-check") == 1
    assert "holds values beyond 65504, the largest of f16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_logits_that_are_no_numbers_are_not_told_as_rounding(plain, tmp_path, capsys):
    base, adapter = plain
    base = changed(base, tmp_path / "base", lambda t: {n: v * torch.nan if "up_proj" in n else v for n, v in t.items()})
    assert run(base, adapter, tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "hold NaN or infinite values" in told
    assert "Export with --dtype f32" not in told


def test_a_base_without_tokenizer_is_refused_before_anything_is_written(plain, tmp_path, capsys, monkeypatch):
    base, adapter = plain
    ignored = shutil.ignore_patterns("tokenizer*")
    shutil.copytree(base, tmp_path / "base", ignore=ignored)
    assert run(tmp_path / "base", adapter, tmp_path / "out", "--no-check") == 0
    monkeypatch.setattr("qlora_dist.export.run.write_model", None)
    assert run(tmp_path / "base", adapter, tmp_path / "other") == 1
    assert f"{tmp_path / 'base'}: has no tokenizer." in capsys.readouterr().err


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys, to):
    base = save_model(tmp_path / "base", vocab_size=100)
    save_tokenizer(base, "gpt2")
    adapter = save_adapter(tmp_path / "a", base)
    assert run(base, adapter, tmp_path / "out", "--to", to) == 1
    assert f"{base}: its tokenizer" in capsys.readouterr().err


def test_an_adapters_chat_template_is_preferred_and_said(plain, tmp_path, caplog):
    import transformers

    base, adapter = plain
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ 'own' }}")
    assert run(base, tmp_path / "a", tmp_path / "out", "--no-check") == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'own' }}"
    assert "its chat template is exported" in caplog.text
    assert run(base, tmp_path / "a", tmp_path / "out.gguf", "--to", "gguf", "--no-check") == 0
    assert b"{{ 'own' }}" in (tmp_path / "out.gguf").read_bytes()


def test_an_adapters_other_tokenizer_is_said(plain, tmp_path, caplog):
    base, adapter = plain
    shutil.copytree(adapter, tmp_path / "a")
    save_tokenizer(tmp_path / "a", "qwen2")
    assert run(base, tmp_path / "a", tmp_path / "out", "--no-check") == 0
    assert "its tokenizer.json numbers tokens otherwise than the base's" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--tokenizer-pre", "llama-bp"], "--tokenizer-pre=llama-bp: expected a name that llama.cpp"),
        (["--to", "hf", "--tokenizer-pre", "gpt-2"], "--tokenizer-pre=gpt-2: expected nothing with hf"),
        (["--to", "gguf-lora", "--tokenizer-pre", "gpt-2"], "expected nothing with gguf-lora"),
    ],
)
def test_a_pre_tokenizer_is_a_name_that_llama_cpp_knows_and_of_gguf(plain, tmp_path, capsys, arguments, message):
    base, adapter = plain
    assert run(base, adapter, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_llama_cpp_has_all_names_of_pre_tokenizers_that_are_taken():
    from pathlib import Path

    from qlora_dist.export.gguf_tokenizer import PRE_TOKENIZER_NAMES, PRE_TOKENIZERS

    assert set(PRE_TOKENIZERS.values()) | {"gpt-2", "default"} <= PRE_TOKENIZER_NAMES
    xllamacpp = pytest.importorskip("xllamacpp")
    library = b"".join(path.read_bytes() for path in Path(xllamacpp.__file__).parent.glob("*.so"))
    assert not [name for name in PRE_TOKENIZER_NAMES if name.encode() not in library]


def test_a_four_bit_base_is_refused_for_a_lora_file_with_its_own_reason(plain, tmp_path, capsys):
    base, adapter = plain
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert run(tmp_path / "base", adapter, tmp_path / "out", "--to", "gguf-lora") == 1
    told = capsys.readouterr().err
    assert "Whether the adapter's layers fit is told by whole weights" in told
    assert "Rounding" not in told


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "/proc/out"])
def test_a_place_where_nothing_can_be_made_is_one_line(plain, tmp_path, capsys, place):
    (tmp_path / "file").write_text("mine")
    assert run(*plain, tmp_path / place) == 1
    assert "out: can't be made in" in capsys.readouterr().err
