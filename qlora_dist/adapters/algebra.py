"""Exact operations on sums of low-rank updates, without ever forming one: a few Gram matrices say everything.

Shape letters: I inputs and O outputs of the adapted layer, R lora_rank of one part, N the sum of all R, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_dist.model.peft_folder import Factors

_BLOCK = 8192  # rows that are held in float64 at a time


def concat(parts: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Returns Σ cᵢ Bᵢ Aᵢ exactly, as [c₁B₁ … cₙBₙ] [A₁; …; Aₙ]; ranks may differ."""
    A_NI = torch.cat([part.A_RI for part in parts])
    B_ON = torch.cat([part.B_OR * c for part, c in zip(parts, coefficients, strict=True)], dim=1)
    return Factors(A_NI, B_ON)


def gram(rows_XN: torch.Tensor) -> torch.Tensor:
    """Returns XᵀX in float64, block by block."""
    total_NN = torch.zeros(rows_XN.shape[1], rows_XN.shape[1], dtype=torch.float64)
    for block in rows_XN.split(_BLOCK):
        wide = block.double()
        total_NN.addmm_(wide.T, wide)
    return total_NN


def inner_products(parts: Sequence[Factors]) -> torch.Tensor:
    """Returns the P×P matrix of ⟨ΔWᵢ, ΔWⱼ⟩ = tr((BᵢᵀBⱼ)(AⱼAᵢᵀ)), in float64."""
    A_NN = gram(torch.cat([part.A_RI for part in parts]).T)
    B_NN = gram(torch.cat([part.B_OR for part in parts], dim=1))
    owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([part.rank for part in parts]))
    member_PN = torch.nn.functional.one_hot(owner, len(parts)).double().T
    return member_PN @ (A_NN * B_NN) @ member_PN.T
