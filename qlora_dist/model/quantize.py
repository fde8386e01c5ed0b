"""4-bit NormalFloat storage (QLoRA, arXiv 2305.14314) through bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_dist.config.model import ModelConfig


def bits_and_bytes(model: ModelConfig) -> Any:
    """Returns the `BitsAndBytesConfig` of the recipe: NF4, its storage dtype equal to the compute dtype.

    Sharded training casts what it gathers to the compute dtype, so any other storage dtype would corrupt the
    packed bytes in silence, or leave them unsharded.
    """
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, model.compute_dtype.name)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def linear4bit_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields the name and module of every 4-bit linear layer."""
    import bitsandbytes

    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            yield name, module


def keep_cpu_weights(model: Any) -> None:
    """Forbids the CPU path that repacks 4-bit weights in place.

    On CPUs with AVX512-BF16, bitsandbytes' first evaluation forward repacks them for speed, and every gradient
    after it is wrong (measured: norm 0.950 became 0.279).
    """
    for _, module in linear4bit_modules(model):
        module.support_avx512bf16_for_cpu = False
