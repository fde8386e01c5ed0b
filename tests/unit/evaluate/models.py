"""Small real models, adapters and packed rows on disk, for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.config.stages import BaseConfig
from qlora_dist.data.rows import SEGMENT
from qlora_dist.model.adapter import Provenance, save_adapter, write_provenance
from qlora_dist.model.base import Base, open_base, prepare_base

VOCAB, END, START, PAD = 64, 1, 0, 2


def save_base(folder: Path, seed: int = 0, model_type: str = "llama", **changes: object) -> Path:
    """Saves a small random model and its `base.json`; returns the folder of the latter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "model")
    base = folder / "base"
    base.mkdir()
    prepare_base(BaseConfig(model=model_config(folder)), {}, base)
    return base


def model_config(folder: Path) -> ModelConfig:
    from qlora_dist.config.model import Dtype

    is_gemma = "gemma" in (folder / "model" / "config.json").read_text()
    return ModelConfig(
        path=str(folder / "model"),
        quantization=Quantization.none,
        compute_dtype=Dtype.float32,
        attention="eager" if is_gemma else "sdpa",
    )


def save_lora(base_folder: Path, folder: Path, seed: int = 1, scale: float = 0.3) -> Path:
    """Saves an adapter of random factors that belongs to the base."""

    def randomize(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=scale)

    return save_trained_lora(open_base(base_folder), folder, randomize, lora_rank=4, seed=seed)


def write_rows(folder: Path, rows: Sequence[Sequence[tuple[int, list[int], int]]], row_tokens: int = 48) -> Path:
    """Writes packed rows of (record, tokens, first target) segments; each target but the end carries 2 bytes."""
    folder.mkdir()
    tokens_BT = np.full((len(rows), row_tokens), PAD, dtype=np.uint32)
    trained_BT = np.zeros((len(rows), row_tokens), dtype=bool)
    table, num_records = [], 1 + max(record for row in rows for record, _, _ in row)
    for b, row in enumerate(rows):
        at = 0
        for record, tokens, first in row:
            tokens_BT[b, at : at + len(tokens)] = tokens
            trained_BT[b, at + first : at + len(tokens)] = True
            carrying = sum(t not in {END, START, PAD} for t in tokens[first:])
            table.append((b, at, len(tokens), record, 2 * carrying))
            at += len(tokens)
    np.save(folder / "tokens.npy", tokens_BT)
    np.save(folder / "trained.npy", trained_BT)
    np.save(folder / "segments.npy", np.array(table, dtype=SEGMENT))
    known = [{"id": f"r{i}", "cluster": f"c{i // 2}", "source": "f:1"} for i in range(num_records)]
    (folder / "records.jsonl").write_text("".join(json.dumps(k) + "\n" for k in known))
    told = {"row_tokens": row_tokens, "num_rows": len(rows), "vocab_size": VOCAB, "end_id": END, "start_id": START,
            "pad_id": PAD, "silent_ids": [START, END, PAD]}  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(told))
    return folder


def random_rows(folder: Path, num_rows: int = 12, seed: int = 0) -> Path:
    """Writes rows of three segments each, two of them of one record that is cut in two."""
    rng = np.random.default_rng(seed)
    rows, record = [], 0
    for _ in range(num_rows):
        texts = [[START, *rng.integers(3, VOCAB, int(rng.integers(6, 14))).tolist(), END] for _ in range(3)]
        rows.append([(record, texts[0], 1), (record, texts[1], 1), (record + 1, texts[2], 4)])
        record += 2
    return write_rows(folder, rows)


def save_trained_lora(base: Base, folder: Path, train: Callable[[Any], None], lora_rank: int, seed: int = 1) -> Path:
    """Saves an adapter that belongs to the base, after `train(model)` has changed its factors."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config)
    train(model)
    folder.mkdir()
    save_adapter(model, folder, base)
    told = Provenance(base_path=base.path, base_revision="", base_digest=base.digest, tokenizer_digest="",
                      quantization="none", dtype="float32", trained_tokens=1)  # fmt: skip
    write_provenance(folder, told)
    return folder
