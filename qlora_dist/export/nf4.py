"""What 4-bit training saw of the base: dequant(NF4(W)), the other base that an adapter can be merged into."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_dist.export.architecture import meta_model


def linear_weights(base: Path) -> frozenset[str]:
    """Returns the names of the weights that loading in 4 bits quantizes: every linear layer's but the head's."""
    from transformers.quantizers.base import get_keys_to_not_convert

    model = meta_model(base)
    kept = set(get_keys_to_not_convert(model))
    linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return frozenset(f"{name}.weight" for name in linear if name not in kept)


def nf4_round_trip(weight_OI: torch.Tensor, *, double_quant: bool = True) -> torch.Tensor:
    """Returns dequant(NF4(W)) in bfloat16, as bitsandbytes stores and computes it (QLoRA, arXiv 2305.14314)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(
        weight_OI.to(device, torch.bfloat16), quant_type="nf4", compress_statistics=double_quant
    )
    rounded: torch.Tensor = dequantize_4bit(packed, state)
    return rounded.cpu()
