"""Products with frozen weights: only what flows back to the input is computed, and 4-bit weights may be cached whole.

Shape letters: I inputs and O outputs of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


class FrozenLinear(nn.Module):
    """A frozen linear layer, dense or 4-bit, whose dequantized weight may be kept.

    A 4-bit weight is dequantized once forward and once backward, so that no 16-bit copy outlives its product,
    unless `keep_dense` was called.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.compute_dtype: torch.dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype
        self._dense_OI: torch.Tensor | None = None

    @property
    def is_4bit(self) -> bool:
        """Says whether the layer's weight is stored in 4 bits."""
        return hasattr(self.layer, "quant_state")

    @property
    def quant_state(self) -> Any:
        """Returns the scales of a 4-bit weight: of its weight, or of its layer where sharding has unwrapped that."""
        return getattr(self.layer.weight, "quant_state", None) or self.layer.quant_state

    @property
    def dense_bytes(self) -> int:
        """Returns the bytes of the whole weight in the compute dtype."""
        return self.layer.in_features * self.layer.out_features * self.compute_dtype.itemsize

    def weight(self) -> torch.Tensor:
        """Returns the weight in the compute dtype, dequantized if it is stored in 4 bits."""
        if self._dense_OI is not None:
            return self._dense_OI
        weight = self.layer.weight
        if not self.is_4bit:
            return weight
        import bitsandbytes.functional as bnb

        dense_OI: torch.Tensor = bnb.dequantize_4bit(weight.data, self.quant_state)
        return dense_OI.to(self.compute_dtype)

    def keep_dense(self) -> None:
        """Keeps the dequantized weight from now on: faster, at `dense_bytes` of memory."""
        self._dense_OI = self.weight()

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Returns x W^T + b."""
        bias = self.layer.bias
        if not self.is_4bit or self._dense_OI is not None:
            return linear(x_BTI, self.weight(), bias)
        y_BTO: torch.Tensor = _DequantizedProduct.apply(x_BTI, self)
        return y_BTO if bias is None else y_BTO + bias


class _DequantizedProduct(torch.autograd.Function):
    """Forward x W^T, backward dy W, each with a weight dequantized on the spot and saved by neither."""

    @staticmethod
    def forward(ctx: Any, x_BTI: torch.Tensor, frozen: FrozenLinear) -> torch.Tensor:
        ctx.frozen = frozen
        return linear(x_BTI, frozen.weight())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.frozen.weight(), None


def frozen_linears(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """Yields the name and module of every frozen linear layer."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            yield name, module


def keep_dense_within(model: nn.Module, budget_bytes: int) -> int:
    """Keeps dequantized weights of 4-bit layers, in order, as long as the budget lasts; returns the bytes used."""
    used = 0
    for _, layer in frozen_linears(model):
        if layer.is_4bit and used + layer.dense_bytes <= budget_bytes:
            layer.keep_dense()
            used += layer.dense_bytes
    return used
