"""Property tests: what is done in the space of the factors equals what dense float64 matrices give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.adapters.algebra import Core, Stack, compress, concat, halve
from qlora_dist.adapters.methods import weighted_sum
from qlora_dist.model.peft_folder import Factors

FEW = settings(max_examples=40, deadline=None)


@st.composite
def some_parts(draw, max_parts: int = 4) -> list[Factors]:
    """Random parts of one layer: any ranks (above the layer's width too), any scales, some zero, some dependent."""
    num_out, num_in = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    ranks = draw(st.lists(st.integers(1, 8), min_size=1, max_size=max_parts))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for rank in ranks:
        A_RI, B_OR = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
        kind = draw(st.sampled_from(["free", "zero", "shared A", "unbalanced", "repeated row"]))
        if kind == "zero":
            B_OR = B_OR * 0
        elif kind == "shared A" and parts and parts[0].rank == rank:
            A_RI = parts[0].A_RI
        elif kind == "unbalanced":
            A_RI, B_OR = A_RI * 1e5, B_OR * 1e-5
        elif kind == "repeated row":
            A_RI = A_RI[:1].expand(rank, -1).clone()
        parts.append(Factors(A_RI, B_OR * draw(st.sampled_from([1.0, 0.01, 30.0]))))
    return parts


some_weights = st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4)


def dense_sum(parts: list[Factors], weights: list[float]) -> torch.Tensor:
    return sum(w * part.dense() for w, part in zip(weights, parts, strict=False))


def size(parts: list[Factors], weights: list[float]) -> float:
    """Returns the size that rounding is measured against: not 0 where parts cancel or weigh nothing."""
    norms = [float(part.dense().norm()) for part in parts]
    return sum(abs(w) * norm for w, norm in zip(weights, norms, strict=False)) + 1e-8 * sum(norms) + 1e-30


@FEW
@given(some_parts(), some_weights)
def test_concat_is_the_sum_for_any_ranks_and_negative_weights(parts, weights):
    weights = weights[: len(parts)]
    found = concat(parts, weights)
    assert found.rank == sum(part.rank for part in parts)
    assert (found.dense() - dense_sum(parts, weights)).norm() <= 1e-6 * size(parts, weights)


@FEW
@given(some_parts(), some_weights)
def test_the_core_is_lossless(parts, weights):
    weights = weights[: len(parts)]
    core = Core(Stack(parts))
    for part, block_KL in zip(parts, core.blocks_PKL, strict=True):
        lifted, _ = core.lift(block_KL)
        assert (lifted.dense() - part.dense()).norm() <= 2e-6 * part.dense().norm() + 1e-30
    lifted, sigma = core.lift(weighted_sum(core.blocks_PKL, weights))
    wanted = dense_sum(parts, weights)
    assert (lifted.dense() - wanted).norm() <= 2e-6 * size(parts, weights)
    dense_sigma = torch.linalg.svdvals(wanted)[: len(sigma)]
    assert (sigma[: len(dense_sigma)] - dense_sigma).norm() <= 1e-6 * size(parts, weights)


@FEW
@given(some_parts(), some_weights, st.integers(-8, 8))
def test_a_sum_does_not_depend_on_how_parts_are_shared_between_their_factors(parts, weights, exponent):
    weights = weights[: len(parts)]
    found, sigma = Stack(parts).best(weights)
    wanted = dense_sum(parts, weights)
    assert (found.dense() - wanted).norm() <= 2e-6 * size(parts, weights)
    dense_sigma = torch.linalg.svdvals(wanted)[: len(sigma)]
    assert (sigma[: len(dense_sigma)] - dense_sigma).norm() <= 1e-6 * size(parts, weights)
    shift = [2.0 ** (exponent if i % 2 else -exponent) for i in range(len(parts))]
    other, _ = Stack([Factors(p.A_RI * x, p.B_OR / x) for p, x in zip(parts, shift, strict=True)]).best(weights)
    assert (other.dense() - wanted).norm() <= 2e-6 * size(parts, weights)


@FEW
@given(some_parts())
def test_inner_products_are_those_of_the_dense_updates(parts):
    found = Stack(parts).inner_products()
    flat = torch.stack([part.dense().flatten() for part in parts])
    scale = flat.norm(dim=1).outer(flat.norm(dim=1))
    assert ((found - flat @ flat.T).abs() <= 2e-6 * scale + 1e-30).all()


@FEW
@given(some_parts(), some_weights, st.integers(1, 6))
def test_a_cut_is_the_best_of_its_rank(parts, weights, rank):
    weights = weights[: len(parts)]
    found, _ = Stack(parts).best(weights, rank)
    assert found.rank <= rank
    wanted = dense_sum(parts, weights)
    best = torch.linalg.svdvals(wanted)[rank:].norm()
    assert (found.dense() - wanted).norm() <= best + 2e-6 * size(parts, weights)


def test_rows_of_zeros_on_either_side_change_nothing():
    torch.manual_seed(0)
    A_RI, B_OR = torch.randn(4, 9), torch.randn(7, 4)
    A_RI[1], B_OR[:, 2] = 0, 0
    parts = [Factors(A_RI, B_OR), Factors(A_RI * 0, torch.randn(7, 4)), Factors(torch.randn(2, 9), torch.randn(7, 2))]
    for rank in (0, 2):
        found, _ = Stack(parts).best([0.5, 1.0, -2.0], rank)
        U, sigma, V = torch.linalg.svd(dense_sum(parts, [0.5, 1.0, -2.0]))
        kept = rank or 4
        assert (found.dense() - (U[:, :kept] * sigma[:kept]) @ V[:kept]).norm() < 1e-5


def test_parts_that_weigh_nothing_leave_nothing():
    parts = [Factors(torch.randn(3, 9), torch.randn(7, 3)), Factors(torch.randn(2, 9), torch.zeros(7, 2))]
    for weights in ([0.0, 1.0], [0.0, 0.0]):
        found, _ = Stack(parts).best(weights)
        assert found.dense().norm() < 1e-12


@FEW
@given(some_parts(), st.floats(0.1, 1.0))
def test_a_cut_by_energy_keeps_that_share_with_the_lowest_rank(parts, energy):
    whole = concat(parts, [1.0] * len(parts))
    found, sigma = compress(whole, energy=energy)
    squares = sigma.square()
    if float(squares.sum()) > 0:
        assert squares[: found.rank].sum() >= energy * squares.sum() * (1 - 1e-6)
        assert found.rank == 1 or squares[: found.rank - 1].sum() < energy * squares.sum()


@FEW
@given(some_parts(), some_weights, st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_matter(parts, weights, random):
    order = list(range(len(parts)))
    random.shuffle(order)
    a, _ = Stack(parts).best(weights[: len(parts)])
    b, _ = Stack([parts[i] for i in order]).best([weights[i] for i in order])
    assert (a.dense() - b.dense()).norm() <= 4e-6 * size(parts, weights)


@FEW
@given(some_parts(max_parts=1), st.floats(0.125, 8))
def test_one_part_with_weight_one_is_itself_and_scaling_scales(parts, factor):
    assert (concat(parts, [1.0]).dense() == parts[0].dense()).all()
    scaled = concat(parts, [factor]).dense()
    assert (scaled - factor * parts[0].dense()).norm() <= 1e-6 * factor * parts[0].dense().norm() + 1e-30


def test_singular_values_are_split_evenly_between_the_factors():
    parts = [Factors(torch.randn(4, 30), torch.randn(20, 4) * 1e3)]
    found, sigma = compress(parts[0])
    assert torch.linalg.svdvals(found.A_RI.double()) == pytest.approx(sigma.sqrt().numpy(), rel=1e-5)
    assert torch.linalg.svdvals(found.B_OR.double()) == pytest.approx(sigma.sqrt().numpy(), rel=1e-5)


def test_halving_a_gram_matrix_gives_orthonormal_columns():
    X = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 9, dtype=torch.float64)
    root, inverse = halve(X.T @ X)
    assert root.shape == (6, 9)
    assert torch.allclose(root.T @ root, X.T @ X)
    assert torch.allclose((X @ inverse).T @ (X @ inverse), torch.eye(6, dtype=torch.float64), atol=1e-6)
