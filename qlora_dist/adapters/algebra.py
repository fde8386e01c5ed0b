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

from collections.abc import Sequence

import torch

from qlora_dist.model.peft_folder import Factors

_BLOCK = 8192  # rows that are held in float64 at a time
_PIVOT = 1e-2  # smallest pivot over the largest, above which a Cholesky factor loses nothing
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
    return Stack([whole]).best([1.0], rank, energy)


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


def halve_fast(gram_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `halve` does, by a Cholesky factor, which is less work, where X is far from losing rank."""
    lower_NN, failed = torch.linalg.cholesky_ex(gram_NN)
    pivots_N = lower_NN.diagonal()
    if int(failed) or float(pivots_N.min()) < _PIVOT * float(pivots_N.max()):
        return halve(gram_NN)
    identity_NN = torch.eye(len(gram_NN), dtype=gram_NN.dtype)
    return lower_NN.T, torch.linalg.solve_triangular(lower_NN.T, identity_NN, upper=True)


class Stack:
    """Parts side by side, B_ON and A_NI, known by their Gram matrices `B_NN` = BᵀB and `A_NN` = AAᵀ alone."""

    def __init__(self, parts: Sequence[Factors]) -> None:
        self.parts = parts
        self.ranks_P = torch.tensor([part.rank for part in parts])
        self.of_part = _slices(self.ranks_P)
        self.B_NN = gram(torch.cat([part.B_OR for part in parts], dim=1))
        self.A_NN = gram(torch.cat([part.A_RI for part in parts]).T)

    def inner_products(self) -> torch.Tensor:
        """Returns the P×P matrix of ⟨ΔWᵢ, ΔWⱼ⟩ = tr(BᵢᵀBⱼ AⱼAᵢᵀ), the sum over all entries of their product."""
        both_NN = self.B_NN * self.A_NN
        rows_PN = torch.stack([both_NN[part].sum(0) for part in self.of_part])
        return torch.stack([rows_PN[:, part].sum(1) for part in self.of_part], dim=1)

    def best(self, coefficients: Sequence[float], rank: int = 0, energy: float = 0.0) -> tuple[Factors, torch.Tensor]:
        """Returns the best approximation of Σ cᵢ Bᵢ Aᵢ of at most `rank`, √σ on each side, and all its singular values.

        With FᵀF = BᵀB and B E orthonormal, F C AAᵀ Cᵀ Fᵀ = W Σ² Wᵀ gives U = B E W, and Uᵀ ΔW = Wᵀ F C A: ΔW is
        projected on U, so that what is kept is exact whatever the rounding in Σ.
        """
        sigma_K, W_KK, inverse_NK, root_KN = self._decompose(coefficients)
        kept = kept_rank(sigma_K, rank, energy)
        if not kept:
            return self.nothing(), sigma_K
        root_R, W_KR = sigma_K[:kept].sqrt(), W_KK[:, :kept]
        left_NR, right_RN = inverse_NK @ (W_KR * root_R), (W_KR / root_R).T @ root_KN
        return Factors(self.lift_right(right_RN), self.lift_left(left_NR)), sigma_K

    def singular_values(self, coefficients: Sequence[float]) -> torch.Tensor:
        """Returns those of Σ cᵢ Bᵢ Aᵢ, largest first."""
        return self._decompose(coefficients)[0]

    def _decompose(self, coefficients: Sequence[float]) -> tuple[torch.Tensor, ...]:
        """Returns Σ, W, E and F C. Each column of B is first made as long as its row of A, so that none is cut."""
        ratio_N = self.A_NN.diagonal() / self.B_NN.diagonal()
        d_N = torch.where((ratio_N > 0) & ratio_N.isfinite(), ratio_N, 1.0).pow(0.25)
        root_KN, inverse_NK = halve_fast(self.B_NN * d_N.outer(d_N))
        each_N = torch.tensor(list(coefficients), dtype=torch.float64).repeat_interleave(self.ranks_P)
        root_KN = root_KN * (each_N / d_N)
        squares_K, W_KK = torch.linalg.eigh(root_KN @ self.A_NN @ root_KN.T)
        sigma_K = squares_K.flip(0).clamp_(min=0).sqrt()
        return sigma_K, W_KK.flip(1), d_N[:, None] * inverse_NK, root_KN

    def nothing(self) -> Factors:
        """Returns an update of zero, of rank 1: PEFT wants one at least."""
        return Factors(self.parts[0].A_RI[:1] * 0, self.parts[0].B_OR[:, :1] * 0)

    def lift_left(self, left_NR: torch.Tensor) -> torch.Tensor:
        """Returns B_ON X without putting the parts side by side."""
        pieces = left_NR.float().split([part.rank for part in self.parts])
        total_OR = torch.matmul(self.parts[0].B_OR, pieces[0])
        for part, piece in zip(self.parts[1:], pieces[1:], strict=True):
            total_OR.addmm_(part.B_OR, piece)
        return total_OR

    def lift_right(self, right_RN: torch.Tensor) -> torch.Tensor:
        """Returns Y A_NI without stacking the parts."""
        pieces = right_RN.float().split([part.rank for part in self.parts], dim=1)
        total_RI = torch.matmul(pieces[0], self.parts[0].A_RI)
        for part, piece in zip(self.parts[1:], pieces[1:], strict=True):
            total_RI.addmm_(piece, part.A_RI)
        return total_RI


class Core:
    """The lossless K×L core of some parts (core space, arXiv 2509.17786): ΔWᵢ = U_OK blocks_PKL[i] V_LI.

    U and V are the left singular vectors of the stacked balanced B and of the stacked balanced Aᵀ, each part with
    its own scale and no merge weight; methods that work entry by entry depend on that basis. U and V themselves are
    never formed: U = B_ON `left_NK`, V = `right_LN` A_NI. By its own A alone, ΔWᵢ = U_OK `own_KR[i]` Aᵢ.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        B_NN, A_NN = stack.B_NN, stack.A_NN
        balanced = [_balance(B_NN[part, part], A_NN[part, part]) for part in stack.of_part]
        X_NM = torch.block_diag(*(x for x, _ in balanced))
        Y_MN = torch.block_diag(*(y for _, y in balanced))
        root_KM, left_MK = halve(X_NM.T @ B_NN @ X_NM)
        root_LM, right_ML = halve(Y_MN @ A_NN @ Y_MN.T)
        self.left_NK, self.right_LN = X_NM @ left_MK, right_ML.T @ Y_MN
        inner = _slices(torch.tensor([x.shape[1] for x, _ in balanced]))
        self.blocks_PKL = torch.stack([root_KM[:, part] @ root_LM[:, part].T for part in inner])
        self.own_KR = [root_KM[:, part] @ y for part, (_, y) in zip(inner, balanced, strict=True)]

    def lift(self, core_KL: torch.Tensor, rank: int = 0, energy: float = 0.0) -> tuple[Factors, torch.Tensor]:
        """Returns U core V as factors of at most `rank`, √σ on each side, and the core's singular values."""
        U_KS, sigma_S, V_SL = torch.linalg.svd(core_KL, full_matrices=False)
        kept = kept_rank(sigma_S, rank, energy)
        if not kept:
            return self.stack.nothing(), sigma_S
        root = sigma_S[:kept].sqrt()
        left_NR = self.left_NK @ (U_KS[:, :kept] * root)
        right_RN = (root[:, None] * V_SL[:kept]) @ self.right_LN
        return Factors(self.stack.lift_right(right_RN), self.stack.lift_left(left_NR)), sigma_S


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


def _slices(sizes: torch.Tensor) -> list[slice]:
    return [slice(end - size, end) for end, size in zip(sizes.cumsum(0).tolist(), sizes.tolist(), strict=True)]
