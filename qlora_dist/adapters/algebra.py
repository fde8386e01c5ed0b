"""Exact operations on sums of low-rank updates, without ever forming one: two small Gram matrices say everything.

Put the parts side by side, B_ON = [B₁ … Bₙ] and A_NI = [A₁; …; Aₙ]. Every merge of this room is B X A or comes from
it by a small matrix X_NN that follows from BᵀB and AAᵀ. Those are sums over rows, so they need one pass over the
factors, in blocks, in float64; what is left is of size N, whatever the layer's. A dense merge takes an SVD of O×I.

Factors are defined only up to an invertible R×R matrix between B and A. Parts are balanced first (each rewritten
as U√Σ · √ΣVᵀ), so that no result depends on that choice.

Shape letters: I inputs and O outputs of the adapted layer, R lora_rank of one part, N the sum of all R, P parts,
K ≤ N and L ≤ N the ranks of the two stacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qlora_dist.model.peft_folder import Factors

_BLOCK = 8192  # rows that are held in float64 at a time
_CUT = 1e-13  # squares of singular values below this share of the largest are rounding (3e-7 of it, unsquared)


def concat(parts: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Returns Σ cᵢ Bᵢ Aᵢ exactly, as [c₁B₁ … cₙBₙ] [A₁; …; Aₙ]; ranks may differ."""
    A_NI = torch.cat([part.A_RI for part in parts])
    B_ON = torch.cat([part.B_OR * c for part, c in zip(parts, coefficients, strict=True)], dim=1)
    return Factors(A_NI, B_ON)


def compress(whole: Factors, rank: int = 0, energy: float = 0.0) -> tuple[Factors, torch.Tensor]:
    """Returns the best approximation of lower rank (Eckart & Young 1936), and all singular values of `whole`.

    Args:
        whole: the update.
        rank: the most that is kept; 0 keeps what isn't rounding.
        energy: the share of ‖ΔW‖² that is kept at least, by the lowest rank that does; 0 leaves it to `rank`.
    """
    core = Core([whole])
    return core.lift(core.blocks_PKL[0], rank, energy)


def gram(rows_XN: torch.Tensor) -> torch.Tensor:
    """Returns XᵀX in float64, block by block."""
    total_NN = torch.zeros(rows_XN.shape[1], rows_XN.shape[1], dtype=torch.float64)
    for block in rows_XN.split(_BLOCK):
        wide = block.double()
        total_NN.addmm_(wide.T, wide)
    return total_NN


def halve(gram_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns F_KN and E_NK with FᵀF = XᵀX and X E orthonormal, for the Gram matrix of any X of rank K."""
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    largest = float(values_N[-1]) if len(values_N) else 0.0
    kept = values_N > max(largest * _CUT, torch.finfo(torch.float64).tiny)
    root_K, vectors_NK = values_N[kept].flip(0).sqrt(), vectors_NN[:, kept].flip(1)
    return root_K[:, None] * vectors_NK.T, vectors_NK / root_K


class Core:
    """The lossless K×L core of some parts (core space, arXiv 2509.17786): ΔWᵢ = U_OK blocks_PKL[i] V_LI.

    U and V are the left singular vectors of the stacked balanced B and of the stacked balanced Aᵀ, each part with
    its own scale and no merge weight; methods that work entry by entry depend on that basis. U and V themselves are
    never formed: U = B_ON `left_NK`, V = `right_LN` A_NI. By its own A alone, ΔWᵢ = U_OK `own_KR[i]` Aᵢ.
    """

    def __init__(self, parts: Sequence[Factors]) -> None:
        self.parts = parts
        B_NN = gram(torch.cat([part.B_OR for part in parts], dim=1))
        A_NN = gram(torch.cat([part.A_RI for part in parts]).T)
        balanced = [_balance(B_NN[part, part], A_NN[part, part]) for part in _slices([part.rank for part in parts])]
        X_NM = torch.block_diag(*(x for x, _ in balanced))
        Y_MN = torch.block_diag(*(y for _, y in balanced))
        root_KM, left_MK = halve(X_NM.T @ B_NN @ X_NM)
        root_LM, right_ML = halve(Y_MN @ A_NN @ Y_MN.T)
        self.left_NK, self.right_LN = X_NM @ left_MK, right_ML.T @ Y_MN
        inner = _slices([x.shape[1] for x, _ in balanced])
        self.blocks_PKL = torch.stack([root_KM[:, part] @ root_LM[:, part].T for part in inner])
        self.own_KR = [root_KM[:, part] @ y for part, (_, y) in zip(inner, balanced, strict=True)]

    def inner_products(self) -> torch.Tensor:
        """Returns the P×P matrix of ⟨ΔWᵢ, ΔWⱼ⟩, the sum over all entries of their product."""
        flat_PX = self.blocks_PKL.flatten(1)
        return flat_PX @ flat_PX.T

    def lift(self, core_KL: torch.Tensor, rank: int = 0, energy: float = 0.0) -> tuple[Factors, torch.Tensor]:
        """Returns U core V as factors of at most `rank`, √σ on each side, and the core's singular values."""
        U_KS, sigma_S, V_SL = torch.linalg.svd(core_KL, full_matrices=False)
        kept = kept_rank(sigma_S, rank, energy)
        if not kept:  # nothing is left: PEFT wants a rank of one at least
            return Factors(self.parts[0].A_RI[:1] * 0, self.parts[0].B_OR[:, :1] * 0), sigma_S
        root = sigma_S[:kept].sqrt()
        left_NR = self.left_NK @ (U_KS[:, :kept] * root)
        right_RN = (root[:, None] * V_SL[:kept]) @ self.right_LN
        return Factors(self.lift_right(right_RN), self.lift_left(left_NR)), sigma_S

    def lift_left(self, left_NR: torch.Tensor) -> torch.Tensor:
        """Returns B_ON X without putting the parts side by side."""
        pieces = left_NR.float().split([part.rank for part in self.parts])
        return _sum(part.B_OR @ piece for part, piece in zip(self.parts, pieces, strict=True))

    def lift_right(self, right_RN: torch.Tensor) -> torch.Tensor:
        """Returns Y A_NI without stacking the parts."""
        pieces = right_RN.float().split([part.rank for part in self.parts], dim=1)
        return _sum(piece @ part.A_RI for part, piece in zip(self.parts, pieces, strict=True))


def kept_rank(sigma_S: torch.Tensor, rank: int = 0, energy: float = 0.0) -> int:
    """Returns how many singular values are kept: never rounding, at most `rank`, enough for `energy`."""
    squares = sigma_S.double().square()
    total = float(squares.sum())
    if total == 0.0:
        return 0
    kept = int((squares > squares[0] * _CUT).sum())
    if energy:
        enough = torch.searchsorted(squares.cumsum(0), total * energy * (1 - 1e-12))
        kept = min(kept, int(enough) + 1)
    return min(kept, rank) if rank else kept


def _balance(B_RR: torch.Tensor, A_RR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns X and Y with B X = U√Σ and Y A = √ΣVᵀ, where B A = UΣVᵀ, from the Gram matrices of B and Aᵀ."""
    root_B, inverse_B = halve(B_RR)
    root_A, inverse_A = halve(A_RR)
    U, sigma, V = torch.linalg.svd(root_B @ root_A.T, full_matrices=False)
    root = sigma.sqrt()
    return inverse_B @ (U * root), (root[:, None] * V) @ inverse_A.T


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _sum(terms: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total
