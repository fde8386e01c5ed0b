"""Small models with real tokenizers and an adapter that moves them, saved to disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MODELS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma": "GemmaConfig",
    "gpt2": "GPT2Config",
}
TEXT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    "documentation files, to deal in the Software without restriction, including the rights to use, copy, modify.\n"
    "The licence of 1998 says it's so; we'll see what they've done with 12 of 345 copies.  Two  spaces, émigré.\n"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


SPLITS = {"llama3": LLAMA3_SPLIT, "qwen2": LLAMA3_SPLIT.replace("{1,3}", "")}


def save_tokenizer(folder: Path, kind: str) -> int:
    """Trains a small BPE tokenizer of one of four kinds on TEXT and returns its size."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", *special, *(f"<0x{i:02X}>" for i in range(256))]
        alphabet = []
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        if kind in SPLITS:
            split = pre_tokenizers.Split(Regex(SPLITS[kind]), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if kind == "sentencepiece":
        unmark_bytes(folder / "tokenizer.json")
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": "{{ messages }}"}))
    return int(tokenizer.get_vocab_size())


def unmark_bytes(path: Path) -> None:
    """Makes the byte tokens plain vocabulary, as they are in SentencePiece models."""
    fields = json.loads(path.read_text())
    fields["added_tokens"] = [t for t in fields["added_tokens"] if not t["content"].startswith("<0x")]
    path.write_text(json.dumps(fields))


def save_model(
    folder: Path, kind: str = "llama", tokenizer: str = "gpt2", shards: bool = False, **fields: object
) -> Path:
    """Saves a random two-layer model with its tokenizer, generation config and chat template."""
    import torch
    import transformers

    vocab_size = save_tokenizer(folder, tokenizer)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shape = {
        "vocab_size": vocab_size + 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if kind == "qwen3":
        shape["head_dim"] = 32
    dtype = getattr(torch, str(fields.pop("dtype", "float32")))
    config = getattr(transformers, MODELS[kind])(**shape | ids | fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, values in model.named_parameters():
        if values.ndim == 2:
            values.data.normal_(std=0.3 if "embed" in name or "lm_head" in name else 0.1)
        elif name.endswith("bias"):
            values.data.normal_(std=0.1)
    model.to(dtype).save_pretrained(str(folder), max_shard_size="100KB" if shards else "5GB")
    return folder


def save_adapter(folder: Path, base: Path, std: float = 0.05, with_copies: bool = False, **fields: object) -> Path:
    """Saves a random adapter of all linear layers whose size is set by `std`; `with_copies` as PEFT does by itself."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    told = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**told | fields))
    for name, values in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            values.data.normal_(std=std)
        elif "modules_to_save" in name:
            values.data.add_(0.1)
    model.save_pretrained(str(folder), save_embedding_layers="auto" if with_copies else False)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns a small Llama in two or more shards, and an adapter of it."""
    root = tmp_path_factory.mktemp("llama")
    base = save_model(root / "base", shards=True)
    return base, save_adapter(root / "adapter", base)
