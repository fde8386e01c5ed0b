from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from qlora_dist.evaluate.statistics import MIN_CLUSTERS, estimate_ratio, holm


def sample(kind: str, num_clusters: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Draws documents in clusters of 1, 2, 3 ...: numerators, denominators, clusters, and the true ratio."""
    sizes = rng.geometric(0.6, num_clusters)
    clusters = np.repeat(np.arange(num_clusters), sizes)
    num_bytes = rng.lognormal(6, 0.8, len(clusters))
    if kind == "bits":
        rate = 2.0 + np.repeat(rng.normal(0, 0.4, num_clusters), sizes) + rng.normal(0, 0.2, len(clusters))
        return rate * num_bytes, num_bytes, clusters, 2.0
    if kind == "difference":
        rate = -0.1 + np.repeat(rng.normal(0, 0.1, num_clusters), sizes) + 0.05 * rng.standard_t(4, len(clusters))
        return rate * num_bytes, num_bytes, clusters, -0.1
    chance = np.repeat(rng.beta(3, 2, num_clusters), sizes)
    return (rng.random(len(clusters)) < chance).astype(float), np.ones(len(clusters)), clusters, 0.6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bits", "difference", "match"])
@pytest.mark.parametrize("num_clusters", [15, 40])
def test_interval_of_95_percent_holds_the_truth_in_93_to_97_percent(kind: str, num_clusters: int) -> None:
    rng, hits, given, trials = np.random.default_rng(7), 0, 0, 1500
    for trial in range(trials):
        tops, bottoms, clusters, truth = sample(kind, num_clusters, rng)
        found = estimate_ratio(tops, bottoms, clusters, seed=trial)
        if found.low is not None and found.high is not None:
            given += 1
            hits += found.low <= truth <= found.high
    assert given >= 0.9 * trials
    assert 0.93 <= hits / given <= 0.97


def test_copies_of_documents_in_a_cluster_add_no_certainty() -> None:
    tops, bottoms, clusters, _ = sample("bits", 30, np.random.default_rng(0))
    once = estimate_ratio(tops, bottoms, clusters)
    copied = estimate_ratio(np.tile(tops, 5), np.tile(bottoms, 5), np.tile(clusters, 5))
    naive = estimate_ratio(np.tile(tops, 5), np.tile(bottoms, 5), np.arange(5 * len(tops)))
    assert once.low is not None
    assert copied.low == pytest.approx(once.low)
    assert naive.low is not None
    assert naive.low > once.low


def test_too_few_or_too_uneven_clusters_and_equal_documents_have_no_interval() -> None:
    few = MIN_CLUSTERS - 1
    assert estimate_ratio(np.arange(few) + 1.0, np.ones(few), np.arange(few)).low is None
    one_rules = np.array([1e6] + [1.0] * 30)
    assert estimate_ratio(2 * one_rules + np.arange(31), one_rules, np.arange(31)).low is None
    same = estimate_ratio(np.full(50, 0.3), np.ones(50), np.arange(50))
    assert (same.value, same.low) == (pytest.approx(0.3), None)


@drawn(scale=st.floats(0.01, 1e6), shift=st.floats(-100, 100), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_interval_moves_with_units_and_offset(scale: float, shift: float, seed: int) -> None:
    tops, bottoms, clusters, _ = sample("bits", 20, np.random.default_rng(seed))
    plain = estimate_ratio(tops, bottoms, clusters)
    moved = estimate_ratio(scale * (tops + shift * bottoms), bottoms, clusters)
    for ours, theirs in zip((plain.value, plain.low, plain.high), (moved.value, moved.low, moved.high), strict=True):
        assert ours is not None
        assert theirs == pytest.approx(scale * (ours + shift), rel=1e-6, abs=1e-6 * scale)


def test_p_value_falls_with_the_effect_and_is_even_without_one() -> None:
    rng = np.random.default_rng(3)
    none = [estimate_ratio(rng.normal(0, 1, 40), np.ones(40), np.arange(40), seed=i).p_value for i in range(300)]
    assert np.mean([p is not None and p < 0.05 for p in none]) == pytest.approx(0.05, abs=0.04)
    strong = estimate_ratio(rng.normal(2, 1, 40), np.ones(40), np.arange(40)).p_value
    assert strong is not None
    assert strong < 0.001


def test_effect_of_the_minimal_detectable_size_is_found_in_four_of_five_samples() -> None:
    rng, found = np.random.default_rng(5), 0
    effect = 2.8016 * 1 / math.sqrt(60)
    for trial in range(300):
        p = estimate_ratio(rng.normal(effect, 1, 60), np.ones(60), np.arange(60), seed=trial).p_value
        found += p is not None and p < 0.05
    assert found / 300 == pytest.approx(0.8, abs=0.07)
    estimate = estimate_ratio(rng.normal(0, 1, 60), np.ones(60), np.arange(60))
    assert estimate.minimal_detectable == pytest.approx(effect, rel=0.3)


def test_holm_multiplies_step_by_step_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
