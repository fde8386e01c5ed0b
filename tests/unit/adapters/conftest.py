"""Random PEFT folders of a few small layers, and the dense updates that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_dist.model.adapter import Provenance, write_provenance
from qlora_dist.model.peft_folder import PeftFolder

SHAPES = {"model.layers.0.self_attn.q_proj": (12, 10), "model.layers.0.mlp.down_proj": (10, 24)}
PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "/models/base",
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
}


def provenance(**changed: Any) -> Provenance:
    """Returns what a training would have written, with some fields changed."""
    fields: dict[str, Any] = {
        "base_path": "/models/base",
        "base_revision": "",
        "base_digest": "b" * 64,
        "tokenizer_digest": "t" * 64,
        "quantization": "nf4",
        "dtype": "bfloat16",
        "trained_tokens": 1000,
    }
    return Provenance(**fields | changed)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes one random adapter folder and returns its path."""

    def make(
        name: str,
        *,
        seed: int = 0,
        shapes: dict[str, tuple[int, int]] | None = None,
        ranks: dict[str, int] | None = None,
        known: Provenance | None = None,
        extra: dict[str, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        fields = PLAIN | config
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (num_out, num_in) in (shapes or SHAPES).items():
            rank = (ranks or {}).get(module, fields["r"])
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, num_in, generator=draw).to(dtype)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(num_out, rank, generator=draw).to(dtype)
        save_file(tensors | (extra or {}), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        if known is not None:
            write_provenance(folder, known)
        return folder

    return make


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Returns ΔW of every module in float64."""
    with PeftFolder(folder) as adapter:
        return {module: adapter.factors(module).dense() for module in adapter.modules}
