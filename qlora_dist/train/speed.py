"""How much arithmetic a training asks for, and which share of a GPU's it gets.

N parameters of the decoder's linear layers, H of the head, P of an adapter, S slots of a row, h hidden size, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from qlora_dist.model.frozen import FrozenLinear
from qlora_dist.train.lanes import Lane
from qlora_dist.train.step import Stepper

PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Operations a second of dense bfloat16 products, by words of the GPU's name (NVIDIA's data sheets)."""


def peak_per_s(name: str) -> float:
    """Returns the operations a second that a GPU of this name is said to do; 0 for one that isn't known."""
    if re.search(r"\b(Laptop|Ti|D|MIG)\b", name):
        return 0.0  # another chip, or a part of one
    longest_first = sorted(PEAKS, key=len, reverse=True)
    return next((PEAKS[words] for words in longest_first if re.search(rf"\b{words}\b", name)), 0.0)


def operations_per_token(stepper: Stepper, lane: Lane) -> float:
    """Returns the operations that one token of a lane asks for: 4(N + H) + 6P + 3.5a, a = 2 S h L.

    A frozen weight is multiplied forward and once backward, a factor twice backward; attention is causal. What is
    computed again to save memory isn't counted, as MFU has it (PaLM, arXiv 2204.02311, appendix B).
    """
    model = stepper.model.model
    linear = [m.layer for m in model.modules() if isinstance(m, FrozenLinear)]
    adapted = {id(layer) for layer in linear}
    linear += [m for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in adapted]
    N_and_H = sum(layer.in_features * layer.out_features for layer in linear)
    P = sum(p.numel() for p in lane.parameters.values())
    config = model.config.get_text_config()
    attention = 2 * lane.train.row_tokens * config.hidden_size * config.num_hidden_layers
    return float(4 * N_and_H + 6 * P + 3.5 * attention)


def utilization(stepper: Stepper, lanes: Sequence[Lane], tokens_per_s: float) -> dict[str, float]:
    """Returns `mfu`, the share of all ranks' peak that this speed is; nothing where the device's peak isn't known."""
    if stepper.strategy.device.type != "cuda" or not lanes:
        return {}
    peak = peak_per_s(torch.cuda.get_device_name(stepper.strategy.device)) * stepper.strategy.world_size
    tokens = [lane.train.tokens_per_step for lane in lanes]
    asked = sum(n * operations_per_token(stepper, lane) for n, lane in zip(tokens, lanes, strict=True)) / sum(tokens)
    return {"mfu": tokens_per_s * asked / peak} if peak else {}
