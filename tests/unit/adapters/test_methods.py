"""Merge methods against their papers' dense definitions, and what all of them must keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.adapters import methods
from qlora_dist.adapters.algebra import Core, Stack
from qlora_dist.adapters.rules import merge_rule
from qlora_dist.config.merge import CALIBRATED, MergeConfig, MergeMethod
from qlora_dist.errors import ModelError
from qlora_dist.model.peft_folder import Factors

ALL = [m for m in MergeMethod if m not in CALIBRATED]


def random_parts(
    num_parts: int = 3, rank: int = 4, num_out: int = 20, num_in: int = 17, seed: int = 0
) -> list[Factors]:
    draw = torch.Generator().manual_seed(seed)
    return [
        Factors(torch.randn(rank, num_in, generator=draw), torch.randn(num_out, rank, generator=draw))
        for _ in range(num_parts)
    ]


def merged(method: MergeMethod, parts: list[Factors], weights: list[float], **fields: object) -> torch.Tensor:
    if method is MergeMethod.svd:
        fields = {"rank": 1000} | fields
    factors, _ = merge_rule(MergeConfig(method=method, **fields), weights)("layer", parts)
    return factors.dense()


@pytest.mark.parametrize("method", [m for m in ALL if m is not MergeMethod.linear_ab])
def test_no_method_depends_on_how_an_update_is_split_into_factors(method):
    parts = random_parts()
    draw = torch.Generator().manual_seed(5)
    gauges = [torch.randn(4, 4, generator=draw) + 3 * torch.eye(4) for _ in parts]
    same = [Factors(torch.linalg.solve(g, p.A_RI), p.B_OR @ g) for p, g in zip(parts, gauges, strict=True)]
    weights = [0.5, 0.3, 0.2]
    one, other = merged(method, parts, weights), merged(method, same, weights)
    assert (one - other).norm() <= 1e-4 * one.norm()


@pytest.mark.parametrize("method", [m for m in ALL if m not in (MergeMethod.iso, MergeMethod.dare)])
def test_one_part_alone_is_unchanged(method):
    parts = random_parts(1)
    found = merged(method, parts, [1.0], density=1.0)
    assert (found - parts[0].dense()).norm() <= 1e-5 * parts[0].dense().norm()


@pytest.mark.parametrize("method", ALL)
def test_the_scale_multiplies_the_result(method):
    parts, weights = random_parts(), [0.5, 0.25, 0.25]
    one, scaled = merged(method, parts, weights), merged(method, parts, weights, scale=1.75)
    assert (scaled - 1.75 * one).norm() <= 1e-5 * scaled.norm()


@pytest.mark.parametrize("method", [m for m in ALL if m not in (MergeMethod.concat, MergeMethod.linear_ab)])
def test_a_bound_on_the_rank_gives_the_best_of_that_rank(method):
    parts, weights = random_parts(), [0.5, 0.25, 0.25]
    whole, cut = merged(method, parts, weights), merged(method, parts, weights, rank=3)
    best = torch.linalg.svdvals(whole)[3:].norm()
    assert torch.linalg.matrix_rank(cut, rtol=1e-5) <= 3
    assert (cut - whole).norm() <= best + 1e-4 * whole.norm()


@pytest.mark.parametrize("method", ALL)
def test_parts_that_are_all_zero_merge_to_zero(method):
    zero = [Factors(p.A_RI, p.B_OR * 0) for p in random_parts(2)]
    assert merged(method, zero, [0.5, 0.5]).norm() == 0


def test_ties_elects_by_the_weighted_sum_and_averages_who_agrees():
    blocks = torch.tensor([[[4.0, 1.0, -3.0]], [[-1.0, 2.0, 1.0]], [[2.0, -9.0, 0.0]]], dtype=torch.float64)
    found = methods.elect_and_mean(blocks, [0.25, 0.25, 0.5])
    # Entry 0: 1 - 0.25 + 1 > 0, so (1 + 1) / 0.75. Entry 1: 0.25 + 0.5 - 4.5 < 0: part 2 alone. Entry 2: -0.75 + 0.25.
    assert found.flatten().tolist() == pytest.approx([2 / 0.75, -9.0, -3.0])


def test_trimming_keeps_the_largest_share_of_each_part():
    blocks = torch.arange(1.0, 21.0, dtype=torch.float64).reshape(2, 2, 5)
    assert (methods._trim(blocks, 0.2) != 0).sum(dim=(1, 2)).tolist() == [2, 2]


def test_ties_of_equal_parts_is_that_part():
    part = random_parts(1)[0]
    found = merged(MergeMethod.ties, [part, part, part], [1 / 3] * 3, density=1.0)
    assert (found - part.dense()).norm() <= 1e-5 * part.dense().norm()


def test_knots_ties_equals_its_dense_definition():
    parts, weights = random_parts(), [0.4, 0.35, 0.25]
    U, sigma, V = torch.linalg.svd(torch.cat([p.dense() for p in parts], dim=1), full_matrices=False)
    U, sigma, V = U[:, :12], sigma[:12], V[:12]
    blocks = torch.stack(V.chunk(3, dim=1))
    wanted = (U * sigma) @ methods.elect_and_mean(methods._trim(blocks, 0.3), weights)
    found = merged(MergeMethod.knots_ties, parts, weights, density=0.3)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_tsv_equals_its_dense_definition():
    parts, weights = random_parts(), [0.4, 0.35, 0.25]
    svds = [torch.linalg.svd(p.dense(), full_matrices=False) for p in parts]
    left, right = (torch.cat([x[:, :4] for x in side], 1) for side in ([s[0] for s in svds], [s[2].T for s in svds]))
    sigma = torch.cat([w * s[1][:4] for w, s in zip(weights, svds, strict=True)])
    polar = [torch.linalg.svd(x, full_matrices=False) for x in (left, right)]
    wanted = polar[0].U @ polar[0].Vh * sigma @ (polar[1].U @ polar[1].Vh).T
    assert (merged(MergeMethod.tsv, parts, weights) - wanted).norm() <= 1e-5 * wanted.norm()


def test_iso_gives_the_sum_one_singular_value():
    parts, weights = random_parts(), [0.4, 0.35, 0.25]
    whole = sum(w * p.dense() for w, p in zip(weights, parts, strict=True))
    sigma = torch.linalg.svdvals(merged(MergeMethod.iso, parts, weights))[:12]
    assert sigma.tolist() == pytest.approx([float(torch.linalg.svdvals(whole)[:12].mean())] * 12, rel=1e-5)


def test_dare_drops_a_share_and_keeps_the_mean():
    blocks = torch.ones(1, 200, 200, dtype=torch.float64)
    found = methods.dare(blocks, [1.0], 0.7, torch.Generator().manual_seed(0))
    assert float((found == 0).double().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)


def test_dare_draws_by_seed_and_module_alone():
    parts = random_parts()
    config = MergeConfig(method=MergeMethod.dare, seed=3)
    rule = merge_rule(config, [0.5, 0.3, 0.2])
    one, again, other = (rule(name, parts)[0].dense() for name in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_regmean_equals_its_dense_definition(seed, keep):
    parts, weights = random_parts(seed=seed), [0.5, 0.25, 0.25]
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(40, 17, generator=draw, dtype=torch.float64) for _ in parts]
    grams = [x.T @ x / 40 for x in inputs]
    found = methods.regmean(parts, weights, grams, keep).dense()
    shrunk = [w * (keep * g + (1 - keep) * g.diagonal().diag()) for w, g in zip(weights, grams, strict=True)]
    wanted = sum(p.dense() @ g for p, g in zip(parts, shrunk, strict=True)) @ torch.linalg.inv(sum(shrunk))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_regmean_is_the_best_on_the_inputs_that_it_was_given():
    parts, weights = random_parts(), [0.5, 0.25, 0.25]
    inputs = [torch.randn(40, 17, dtype=torch.float64) * torch.rand(17) for _ in parts]
    found = methods.regmean(parts, weights, [x.T @ x / 40 for x in inputs], 1.0).dense()

    def cost(update: torch.Tensor) -> float:
        terms = (w * (x @ (update - p.dense()).T).norm() ** 2 for p, w, x in zip(parts, weights, inputs, strict=True))
        return float(sum(terms))

    mean = sum(w * p.dense() for w, p in zip(weights, parts, strict=True))
    assert cost(found) < cost(mean)
    assert all(cost(found) <= cost(found + 1e-3 * torch.randn(found.shape, dtype=torch.float64)) for _ in range(5))


def test_regmean_survives_inputs_that_are_always_zero():
    parts = random_parts(2)
    inputs = [torch.randn(40, 17, dtype=torch.float64) for _ in parts]
    for x in inputs:
        x[:, 3] = 0
    found = methods.regmean(parts, [0.5, 0.5], [x.T @ x for x in inputs], 1.0)
    assert torch.isfinite(found.dense()).all()


def test_averaging_factors_is_wrong_by_the_cross_terms():
    parts = random_parts(4, num_out=200, num_in=200)
    wanted = sum(p.dense() for p in parts) / 4
    found = methods.linear_ab(parts, [0.25] * 4).dense()
    cross = sum(p.B_OR.double() @ q.A_RI.double() for p in parts for q in parts if p is not q) / 16
    assert (found - wanted / 4 - cross).norm() <= 1e-5 * wanted.norm()
    assert (found - wanted).norm() > 0.8 * wanted.norm()


def test_averaging_factors_of_unequal_ranks_is_refused():
    with pytest.raises(ModelError, match="one rank"):
        methods.linear_ab([random_parts(1)[0], random_parts(1, rank=3)[0]], [0.5, 0.5])


def test_a_greedy_soup_keeps_what_improves_the_mean():
    values = {"a": 1.0, "b": -0.9, "c": 9.0, "d": 1.2}

    def score(labels: list[str]) -> float:
        return abs(sum(values[label] for label in labels) / len(labels))

    assert methods.greedy_soup(list(values), score) == ["b", "a"]


def test_learned_weights_find_the_minimum():
    target = torch.tensor([0.7, -0.2, 1.4])
    found = methods.learned(3, lambda w: ((w - target) ** 2).sum(), steps=300, learning_rate=0.05, start=1 / 3)
    assert found == pytest.approx(target.tolist(), abs=1e-2)


def test_the_core_has_the_ranks_of_the_stacks_and_no_more():
    shared = random_parts(1)[0].A_RI
    parts = [Factors(shared, p.B_OR) for p in random_parts(3)]
    assert Core(Stack(parts)).blocks_PKL.shape == (3, 12, 4)
