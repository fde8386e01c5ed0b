"""The product of an adapted layer for rows of many lanes: one product with the base, batched ones with the factors.

Shape letters: B rows, T slots, I inputs and O outputs of the layer, G lanes of a run, N = slots of one lane in the
micro-batch, R lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_dist.model.frozen import FrozenLinear
from qlora_dist.train.bank import Factors


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows of neighbouring lanes of one group, equally many of each: what one batched product takes."""

    rows: slice
    factors: dict[str, Factors]


@dataclass(frozen=True, slots=True)
class Site:
    """A layer as the current micro-batch finds it: its frozen weight, and which rows meet which factors."""

    frozen: FrozenLinear
    seated: list[tuple[slice, Factors]]


def lane_product(
    x_BTI: torch.Tensor, dropped_BTI: torch.Tensor | None, anchor: torch.Tensor, site: Site
) -> torch.Tensor:
    """Returns x W^T + b, and for the rows of each lane + s B A d, where d is x or what dropout leaves of it.

    Gradients of the factors are added to the bank, not returned: so each lane's is summed where its optimizer reads
    it, and a lane's rows touch nothing of another lane, not even by a product with zero.

    Args:
        x_BTI: rows of all lanes.
        dropped_BTI: d, where any lane has dropout.
        anchor: any tensor that wants a gradient; it gets none, but has autograd run the backward pass of a first layer.
        site: the layer.
    """
    y_BTO: torch.Tensor = _LaneProduct.apply(x_BTI, dropped_BTI, anchor, site)
    return y_BTO


class _LaneProduct(torch.autograd.Function):
    """Saves its input and A x; the frozen weight is dequantized anew, or taken from the cache, in each direction."""

    @staticmethod
    def forward(
        ctx: Any, x_BTI: torch.Tensor, dropped_BTI: torch.Tensor | None, anchor: torch.Tensor, site: Site
    ) -> torch.Tensor:
        y_BTO = site.frozen.product(x_BTI)
        seen_BTI = x_BTI if dropped_BTI is None else dropped_BTI
        hidden = []
        for rows, f in site.seated:
            h_GNR = torch.bmm(_by_lane(seen_BTI, rows, f), f.A_GRI.mT).mul_(f.scale_G11)
            _by_lane(y_BTO, rows, f).baddbmm_(h_GNR, f.B_GRO)
            hidden.append(h_GNR)
        ctx.site, ctx.shares_input = site, dropped_BTI is None
        ctx.save_for_backward(seen_BTI, *hidden)
        return y_BTO.to(x_BTI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        seen_BTI, *hidden = ctx.saved_tensors
        dy_BTO = grads[0].to(ctx.site.frozen.product_dtype).contiguous()
        dx_BTI = ctx.site.frozen.back_product(dy_BTO) if ctx.needs_input_grad[0] else None
        dropped = None if ctx.shares_input else torch.zeros_like(seen_BTI, dtype=dy_BTO.dtype)
        target = dx_BTI if ctx.shares_input else dropped
        for (rows, f), h_GNR in zip(ctx.site.seated, hidden, strict=True):
            dy_GNO = _by_lane(dy_BTO, rows, f)
            _add_product(f.grad_B_GRO, h_GNR.mT, dy_GNO)
            dh_GNR = torch.bmm(dy_GNO, f.B_GRO.mT).mul_(f.scale_G11)
            _add_product(f.grad_A_GRI, dh_GNR.mT, _by_lane(seen_BTI, rows, f))
            if target is not None:
                _by_lane(target, rows, f).baddbmm_(dh_GNR, f.A_GRI)
        dtype = seen_BTI.dtype
        return (
            None if dx_BTI is None else dx_BTI.to(dtype),
            None if dropped is None else dropped.to(dtype),
            None,
            None,
        )


def _by_lane(x_BTX: torch.Tensor, rows: slice, factors: Factors) -> torch.Tensor:
    """Returns the rows of a run as [G, N, X], in the dtype of its products: a view where nothing is to be cast."""
    own = (x_BTX if _is_all(rows, len(x_BTX)) else x_BTX[rows]).to(factors.A_GRI.dtype)
    return own.reshape(len(factors.A_GRI), -1, own.shape[-1])


def _is_all(rows: slice, num_rows: int) -> bool:
    return rows.start in (None, 0) and rows.stop in (None, num_rows)


def _add_product(sum_GXY: torch.Tensor, a_GXN: torch.Tensor, b_GNY: torch.Tensor) -> None:
    """Adds a b to a float32 sum."""
    if a_GXN.dtype == sum_GXY.dtype:
        sum_GXY.baddbmm_(a_GXN, b_GNY)
    else:
        sum_GXY.add_(torch.bmm(a_GXN, b_GNY))
