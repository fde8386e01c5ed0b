"""Merge methods, one pure function each: parts (own scales folded in) and weights in, one update out.

None forms a dense ΔW. `ties`, `dare`, `tsv`, `iso` and `weighted_sum` map the lossless cores of the parts to the core
of the result; the others map factors to factors. A scale λ multiplies the result afterwards.

Shape letters: I inputs, O outputs, R lora_rank, P parts, K×L the core of all parts, see `algebra.Core`, S ≤ K the
rank of the parts side by side, X and Y any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qlora_dist.adapters.algebra import Core, concat, halve, kept_rank
from qlora_dist.errors import ModelError
from qlora_dist.model.peft_folder import Factors

Weights = Sequence[float]
_COLUMNS = 256  # of all parts at a time, in knots_ties


def ties(blocks_PKL: torch.Tensor, weights: Weights, density: float) -> torch.Tensor:
    """Merges by TIES (arXiv 2306.01708) in core space (arXiv 2509.17786): trim, elect signs, mean of who agrees.

    Signs are elected by the *weighted* sum, and the mean is weighted: with equal weights this is the paper's rule.

    Args:
        blocks_PKL: the parts' cores.
        weights: of each part.
        density: the share of entries, largest first, that each part keeps.
    """
    return elect_and_mean(_trim(blocks_PKL, density), weights)


def dare(blocks_PKL: torch.Tensor, weights: Weights, drop: float, draw: torch.Generator) -> torch.Tensor:
    """Merges by DARE (arXiv 2311.03099) in core space: drop entries at random, rescale the rest, weighted sum."""
    kept = torch.rand(blocks_PKL.shape, generator=draw, dtype=torch.float64) >= drop
    return weighted_sum(blocks_PKL * kept / (1 - drop), weights)


def tsv(blocks_PKL: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Merges by TSV-M (arXiv 2412.00081): all parts' singular vectors, made orthogonal together, keep their values.

    Where the parts span fewer directions than they have singular vectors (a shared A₀), the nearest matrices with
    orthonormal rows stand in for orthonormal columns.
    """
    left, values, right = [], [], []
    for block_KL, weight in zip(blocks_PKL, weights, strict=True):
        U, sigma, V = torch.linalg.svd(block_KL, full_matrices=False)
        kept = kept_rank(sigma)
        left.append(U[:, :kept])
        values.append(weight * sigma[:kept])
        right.append(V[:kept].T)
    U_KN, V_LN = _nearest_orthogonal(torch.cat(left, 1)), _nearest_orthogonal(torch.cat(right, 1))
    return torch.matmul(U_KN * torch.cat(values), V_LN.T)


def iso(blocks_PKL: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Merges by Iso-C (arXiv 2502.04959): the weighted sum with all its singular values set to their mean."""
    U, sigma, V = torch.linalg.svd(weighted_sum(blocks_PKL, weights), full_matrices=False)
    kept = kept_rank(sigma)
    return torch.matmul(sigma.sum() / max(kept, 1) * U[:, :kept], V[:kept])


def weighted_sum(blocks_PKL: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Returns Σ wᵢ Mᵢ, the core of the exact sum (task arithmetic, arXiv 2212.04089)."""
    return torch.einsum("pkl,p->kl", blocks_PKL, torch.tensor(weights, dtype=blocks_PKL.dtype))


def knots_ties(core: Core, weights: Weights, density: float) -> Factors:
    """Merges by KnOTS-TIES (arXiv 2410.19735), exactly in low rank: [ΔW₁ … ΔWₙ] = UΣ[V₁ᵀ … Vₙᵀ], TIES on the Vᵢᵀ.

    The Vᵢᵀ of all parts are as large as their sum's rank times I each, so they are made twice, one part at a time for
    its threshold and then some columns of all at a time: what is worked on stays in a core's cache.
    """
    flat_KX = torch.cat(list(core.blocks_PKL), dim=1)
    root_SK, inverse_KS = halve(flat_KX @ flat_KX.T)  # ΣUᵀ and UΣ⁻¹
    if not len(root_SK):
        return core.lift(core.blocks_PKL[0])[0]
    A_PRI = [part.A_RI for part in core.stack.parts]
    maps_PSR = [(inverse_KS.T @ own_KR).float() for own_KR in core.own_KR]
    least_P = [_threshold(map_SR @ A_RI, density) for map_SR, A_RI in zip(maps_PSR, A_PRI, strict=True)]
    V_SI = torch.empty(len(root_SK), A_PRI[0].shape[1])
    for some_SX, *A_PRX in zip(*(x.split(_COLUMNS, dim=1) for x in (V_SI, *A_PRI)), strict=True):
        blocks = (_at_least(m @ A, least) for m, A, least in zip(maps_PSR, A_PRX, least_P, strict=True))
        some_SX.copy_(elect_and_mean(torch.stack(list(blocks)), weights))
    return Factors(V_SI, core.stack.lift_left(core.left_NK @ root_SK.T))


def regmean(parts: Sequence[Factors], weights: Weights, grams_PII: Sequence[torch.Tensor], keep: float) -> Factors:
    """Merges by RegMean (arXiv 2212.09849): argmin over ΔW of Σ wᵢ ‖(ΔW − ΔWᵢ) Xᵢ‖², in low rank.

    ΔW = (Σ wᵢ ΔWᵢ Gᵢ)(Σ wⱼ Gⱼ)⁻¹, so that Aᵢ becomes Aᵢ wᵢGᵢ (Σ wⱼGⱼ)⁻¹ and Bᵢ stays.

    Args:
        parts: the updates.
        weights: of each part.
        grams_PII: for each part, the mean over its tokens of x xᵀ, x the layer's input.
        keep: what off-diagonal entries of the Gram matrices are multiplied by (the paper's α, 0.9 or so).
    """
    shrunk = [w * _shrink(g.double(), keep) for g, w in zip(grams_PII, weights, strict=True)]
    total_II = torch.stack(shrunk).sum(0)
    ridge = max(1e-10 * float(total_II.diagonal().mean()), torch.finfo(torch.float64).tiny)
    factor_II, failed = torch.linalg.cholesky_ex(total_II + ridge * torch.eye(len(total_II), dtype=torch.float64))
    if int(failed):
        repair = "Collect them over more rows, or lower keep."
        raise ModelError(f"The Gram matrices of a layer's inputs ({len(total_II)} wide) can't be inverted. {repair}")
    solved = [
        torch.cholesky_solve((part.A_RI.double() @ g).T, factor_II).T for part, g in zip(parts, shrunk, strict=True)
    ]
    return concat([Factors(A.float(), p.B_OR) for A, p in zip(solved, parts, strict=True)], [1.0] * len(parts))


def linear_ab(parts: Sequence[Factors], weights: Weights) -> Factors:
    """Averages A and B apart (FedIT, arXiv 2305.05644): a *baseline* that is wrong by the cross terms BᵢAⱼ.

    It is near the mean of updates only while the parts still share most of one start.

    Raises:
        ModelError: if the ranks differ, since such factors can't be added.
    """
    ranks = sorted({part.rank for part in parts})
    if len(ranks) > 1:
        raise ModelError(f"linear_ab needs adapters of one rank, these have {ranks}. Use method concat or svd.")
    A_RI = torch.stack([w * part.A_RI for w, part in zip(weights, parts, strict=True)]).sum(0)
    B_OR = torch.stack([w * part.B_OR for w, part in zip(weights, parts, strict=True)]).sum(0)
    return Factors(A_RI, B_OR)


def greedy_soup(labels: Sequence[str], score: Callable[[Sequence[str]], float]) -> list[str]:
    """Returns the labels that a greedy soup (arXiv 2203.05482) keeps: best first, each added only if the mean improves.

    Args:
        labels: the candidates.
        score: of the uniform merge of some labels, lower is better; it is called at most 2 x len(labels) times.
    """
    alone = {label: score([label]) for label in labels}
    ordered = sorted(labels, key=lambda label: alone[label])
    chosen, best = ordered[:1], alone[ordered[0]]
    for label in ordered[1:]:
        found = score([*chosen, label])
        if found < best:
            chosen, best = [*chosen, label], found
    return chosen


def learned(
    num_weights: int, loss: Callable[[torch.Tensor], torch.Tensor], *, steps: int, learning_rate: float, start: float
) -> list[float]:
    """Returns the weights with the lowest loss that Adam met (learned scalars, as in AdaMerging, arXiv 2310.02575).

    Args:
        num_weights: one per part, or per part and module.
        loss: a differentiable function of the weights, on development data; see `mixture.Mixture`.
        steps: how often the loss is computed and followed.
        learning_rate: of Adam.
        start: the value that every weight starts from, such as 1 / P.
    """
    weights_P = torch.full((num_weights,), start, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([weights_P], lr=learning_rate)
    best, lowest = weights_P.detach().clone(), float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(weights_P)
        if float(value.detach()) < lowest:
            best, lowest = weights_P.detach().clone(), float(value.detach())
        value.backward()
        optimizer.step()
    return [float(x) for x in best]


def elect_and_mean(blocks_PXY: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Returns, entry by entry, the weighted mean over the parts whose sign is that of the weighted sum."""
    w_P = torch.tensor(weights, dtype=blocks_PXY.dtype)
    weighted = blocks_PXY * w_P[:, None, None]
    sign_XY = weighted.sum(0).sign()
    agreeing = weighted.mul_(sign_XY).clamp_(min=0)  # |wᵢ xᵢ| of those that agree, 0 of the others
    total_XY = agreeing.sum(0)
    count_XY = torch.tensordot(w_P.abs(), agreeing.sign_(), dims=1).clamp_(min=torch.finfo(w_P.dtype).tiny)
    return total_XY.div_(count_XY).mul_(sign_XY)


def _trim(blocks_PXY: torch.Tensor, density: float) -> torch.Tensor:
    return torch.stack([_at_least(block_XY, _threshold(block_XY, density)) for block_XY in blocks_PXY])


def _threshold(block_XY: torch.Tensor, density: float) -> float:
    """Returns the smallest absolute value among the share of entries, largest first, that is kept."""
    sizes = block_XY.abs().flatten().numpy()
    if not len(sizes):
        return 0.0
    dropped = len(sizes) - max(1, round(density * len(sizes)))
    sizes.partition(dropped)
    return float(sizes[dropped]) if dropped else 0.0


def _at_least(block_XY: torch.Tensor, least: float) -> torch.Tensor:
    """Returns the entries whose absolute value is at least `least`, 0 for the others."""
    below = torch.nextafter(torch.tensor(least, dtype=block_XY.dtype), torch.tensor(0.0, dtype=block_XY.dtype))
    return torch.nn.functional.hardshrink(block_XY, float(below))


def _nearest_orthogonal(X_KN: torch.Tensor) -> torch.Tensor:
    """Returns the polar factor of X: its singular values set to one."""
    U, _, V = torch.linalg.svd(X_KN, full_matrices=False)
    return torch.matmul(U, V)


def _shrink(gram_II: torch.Tensor, keep: float) -> torch.Tensor:
    return keep * gram_II + (1 - keep) * gram_II.diagonal().diag()
