"""Products with frozen weights: only what flows back to the input is computed, and 4-bit weights may be cached whole.

Shape letters: I inputs and O outputs of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_dist.model.quantize import linear4bit_modules
from qlora_dist.runtime import device


@lru_cache
def product_dtype(compute_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Returns the dtype in which matrices are multiplied: float32 on CPUs that have no 16-bit units.

    There, 16-bit products are 8 to 60 times slower than float32 ones (docs/log.md). Values keep the precision of the
    compute dtype: 16-bit factors and a float32 sum, rounded to 16 bits, is what 16-bit units compute too.
    """
    mkldnn = torch.ops.mkldnn
    if device_type == "cpu" and compute_dtype == torch.bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if device_type == "cpu" and compute_dtype == torch.float16 and not mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return compute_dtype


class FrozenLinear(nn.Module):
    """A frozen linear layer, dense or 4-bit, whose dequantized weight may be kept.

    A 4-bit weight is dequantized once forward and once backward, so that no 16-bit copy outlives its product,
    unless `keep_dense` was called.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.compute_dtype: torch.dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype
        self.product_dtype = product_dtype(self.compute_dtype, device().type)
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
        """Returns the bytes of the whole weight in the dtype of products."""
        return self.layer.in_features * self.layer.out_features * self.product_dtype.itemsize

    def weight(self) -> torch.Tensor:
        """Returns the weight in the dtype of products, dequantized if it is stored in 4 bits."""
        if self._dense_OI is not None:
            return self._dense_OI
        weight = self.layer.weight.data
        if self.is_4bit:
            import bitsandbytes.functional as bnb

            weight = bnb.dequantize_4bit(weight, self.quant_state).to(self.compute_dtype)
        return weight.to(self.product_dtype)

    def keep_dense(self) -> None:
        """Keeps the dequantized weight from now on: faster, at `dense_bytes` of memory."""
        self._dense_OI = self.weight()

    def product(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Returns x W^T + b in the dtype of products, outside of autograd."""
        bias = self.layer.bias
        return linear(
            x_BTI.to(self.product_dtype), self.weight(), None if bias is None else bias.to(self.product_dtype)
        )

    def back_product(self, dy_BTO: torch.Tensor) -> torch.Tensor:
        """Returns dy W in the dtype of products: the gradient of `product` to its input."""
        return dy_BTO.to(self.product_dtype) @ self.weight()

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Returns x W^T + b."""
        y_BTO: torch.Tensor = _FrozenProduct.apply(x_BTI, self)
        return y_BTO


class _FrozenProduct(torch.autograd.Function):
    """Forward x W^T, backward dy W, each with a weight dequantized on the spot or kept, and saved by neither."""

    @staticmethod
    def forward(ctx: Any, x_BTI: torch.Tensor, frozen: FrozenLinear) -> torch.Tensor:
        ctx.frozen, ctx.dtype = frozen, x_BTI.dtype
        return frozen.product(x_BTI).to(x_BTI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.frozen.back_product(grads[0]).to(ctx.dtype), None


def hold_frozen(model: nn.Module, names: Iterable[str]) -> dict[str, FrozenLinear]:
    """Puts a `FrozenLinear` in the place of each 4-bit linear layer and of each that is named; returns the named."""
    wanted = list(names)
    for name in {**dict.fromkeys(wanted), **dict(linear4bit_modules(model))}:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FrozenLinear(model.get_submodule(name)))  # type: ignore[arg-type]
    return {name: model.get_submodule(name) for name in wanted}  # type: ignore[misc]


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
