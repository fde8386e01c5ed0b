"""Merge methods, one pure function each: parts (own scales folded in) and weights in, one update out.

None forms a dense ΔW. `ties`, `dare`, `tsv`, `iso` and `weighted_sum` map the lossless cores of the parts to the core
of the result; the others map factors to factors. A scale λ multiplies the result afterwards.

Shape letters: I inputs, O outputs, R lora_rank, P parts, K×L the core of all parts, see `algebra.Core`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qlora_dist.adapters.algebra import Core, concat, kept_rank
from qlora_dist.errors import ModelError
from qlora_dist.model.peft_folder import Factors

Weights = Sequence[float]


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
    """Merges by KnOTS-TIES (arXiv 2410.19735), exactly in low rank: [ΔW₁ … ΔWₙ] = UΣ[V₁ᵀ … Vₙᵀ], TIES on the Vᵢᵀ."""
    U, sigma, V = torch.linalg.svd(torch.cat(list(core.blocks_PKL), dim=1), full_matrices=False)
    kept = kept_rank(sigma)
    if not kept:
        return core.lift(core.blocks_PKL[0])[0]
    V_PKL = V[:kept].chunk(len(core.parts), dim=1)
    V_PKI = torch.stack([core.lift_right(V_KL @ core.right_LN) for V_KL in V_PKL])
    V_KI = elect_and_mean(_trim(V_PKI, density), weights)
    return Factors(V_KI, core.lift_left(core.left_NK @ (U[:, :kept] * sigma[:kept])))


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
    w_P = torch.tensor(weights, dtype=blocks_PXY.dtype)[:, None, None]
    weighted = blocks_PXY * w_P
    agrees = (weighted * weighted.sum(0).sign()) > 0
    total = (agrees * w_P.abs()).sum(0)
    return torch.where(total > 0, (weighted * agrees).sum(0) / total.clamp(min=1e-300), 0.0)


def _trim(blocks_PXY: torch.Tensor, density: float) -> torch.Tensor:
    flat_PX = blocks_PXY.abs().flatten(1)
    num_kept = max(1, round(density * flat_PX.shape[1])) if flat_PX.shape[1] else 0
    if num_kept in (0, flat_PX.shape[1]):
        return blocks_PXY
    threshold = flat_PX.kthvalue(flat_PX.shape[1] - num_kept + 1, dim=1).values
    return blocks_PXY * (blocks_PXY.abs() >= threshold[:, None, None])


def _nearest_orthogonal(X_KN: torch.Tensor) -> torch.Tensor:
    """Returns the polar factor of X: its singular values set to one."""
    U, _, V = torch.linalg.svd(X_KN, full_matrices=False)
    return torch.matmul(U, V)


def _shrink(gram_II: torch.Tensor, keep: float) -> torch.Tensor:
    return keep * gram_II + (1 - keep) * gram_II.diagonal().diag()
