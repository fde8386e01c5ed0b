"""GGUF files, judged by llama.cpp itself: same tokens, same greedy text, same perplexity as transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qlora_dist.export.__main__ import main

from .conftest import TEXT, save_adapter, save_model
from .llama_cpp import NUM_GREEDY, LlamaCpp


def transformers_says(base: Path, adapter: Path, tokens: list[int]) -> tuple[list[int], float]:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
        text = ids[:, :8]
        for _ in range(NUM_GREEDY):
            logits = model(input_ids=text).logits[0, -1]
            logits[1] = -torch.inf  # the end token
            text = torch.cat([text, logits.argmax().reshape(1, 1)], 1)
    return text[0, 8:].tolist(), loss


def letter(base: Path) -> int:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("a")


def encode(base: Path, text: str) -> list[int]:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(base)(text).input_ids


def exported(base: Path, adapter: Path, out: Path, *arguments: str) -> Path:
    assert main([str(adapter), "--base", str(base), "--out", str(out), *arguments]) == 0
    return out


@pytest.mark.parametrize(
    ("kind", "tokenizer", "fields"),
    [
        ("llama", "gpt2", {}),
        ("llama", "llama3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("llama", "gpt2", {"attention_bias": True, "tie_word_embeddings": True}),
        ("mistral", "sentencepiece", {"sliding_window": None}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen2", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "llama3.1", "llama-bias-tied", "mistral", "qwen2", "qwen3"],
)  # fmt: skip
def test_llama_cpp_says_what_transformers_says(tmp_path, kind, tokenizer, fields):
    base = save_model(tmp_path / "base", kind, tokenizer, **fields)
    adapter = save_adapter(tmp_path / "adapter", base, use_rslora=True, rank_pattern={"q_proj": 2})
    tokens = encode(base, TEXT)[:40]
    text, loss = transformers_says(base, adapter, tokens)
    bare = save_adapter(tmp_path / "nothing", base, std=0.0)
    merged = exported(base, adapter, tmp_path / "merged.gguf", "--to", "gguf", "--dtype", "f32")
    plain = exported(base, bare, tmp_path / "base.gguf", "--to", "gguf", "--dtype", "f32", "--no-check")
    lora = exported(base, adapter, tmp_path / "lora.gguf", "--to", "gguf-lora")
    for model in (LlamaCpp(merged), LlamaCpp(plain, lora)):
        assert model.greedy(tokens[:8]) == text
        assert model.loss(tokens, 500, letter(base)) == pytest.approx(loss, rel=1e-3)
    assert abs(LlamaCpp(plain).loss(tokens, 500, letter(base)) - loss) > 3e-3 * loss
    assert LlamaCpp(merged).tokens(TEXT) == encode(base, TEXT)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 5e-3), ("f16", 2e-3), ("q8_0", 1e-2)])
def test_smaller_dtypes_stay_within_their_rounding(llama, tmp_path, dtype, tolerance):
    base, adapter = llama
    tokens = encode(base, TEXT)[:40]
    _, loss = transformers_says(base, adapter, tokens)
    merged = exported(base, adapter, tmp_path / "merged.gguf", "--to", "gguf", "--dtype", dtype)
    found = LlamaCpp(merged).loss(tokens, 500, letter(base))
    assert found == pytest.approx(loss, rel=tolerance)


def test_what_rounding_eats_is_said_with_the_repair(tmp_path, capsys):
    base = save_model(tmp_path / "base", dtype="bfloat16")
    adapter = save_adapter(tmp_path / "adapter", base, std=2e-4)
    exported(base, adapter, tmp_path / "bf16.gguf", "--to", "gguf", "--dtype", "bf16", "--no-check")
    told = capsys.readouterr().out
    assert "export with --dtype f32" in told
    exported(base, adapter, tmp_path / "hf", "--dtype", "bf16", "--no-check")
    gain = re.search(r"gain: ([0-9.]+)%", told)
    other = re.search(r"gain: ([0-9.]+)%", capsys.readouterr().out)
    assert float(gain[1]) == pytest.approx(float(other[1]), abs=0.2), "the same rounding, the same gain"
    exported(base, adapter, tmp_path / "f32.gguf", "--to", "gguf", "--dtype", "f32", "--no-check")
    told = capsys.readouterr().out
    assert "gain: 100.0%" in told
    assert "warning" not in told
