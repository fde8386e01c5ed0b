"""The referee on made-up scores whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_dist.adapters.referee import Standing, candidates, choose, judge, pareto_front
from qlora_dist.config.merge import MergeConfig, MergeMethod
from qlora_dist.errors import DataError

LN2 = math.log(2)


def scores(bits: dict[str, tuple[float, float, float]], num_documents: int = 40, noise: float = 0.0) -> list[dict]:
    """Returns rows of candidates whose bits per byte on (legal, code, general) are given."""
    rows = []
    for candidate, values in bits.items():
        rng = np.random.default_rng(len(candidate))
        for domain, value in zip(("legal", "code", "general"), values, strict=True):
            for i in range(num_documents):
                size = 100 + 10 * i
                nll = (value + noise * rng.normal()) * LN2 * size
                row = {"candidate": candidate, "domain": domain, "document": f"{domain}-{i}", "nll": nll}
                rows.append(row | {"bytes": size, "tokens": size // 4})
    return rows


BITS = {
    "base": (3.0, 2.0, 1.0),
    "concat x1": (2.6, 1.8, 1.01),
    "concat x1.5": (2.4, 1.7, 1.04),
    "concat x2": (2.3, 1.6, 1.30),
    "legal-0": (2.5, 2.1, 1.05),
}


def test_the_most_gain_within_the_tolerance_is_shipped():
    verdict = judge(scores(BITS), forgetting_at_most=0.05)
    assert verdict["chosen"] == "concat x1.5"
    assert verdict["front"] == ["concat x1", "concat x1.5", "concat x2"]
    assert verdict["gain"]["value"] == pytest.approx((0.6 + 0.3) / 2)
    assert verdict["forgetting"]["value"] == pytest.approx(0.04)
    by_name = {s["candidate"]: s for s in verdict["standings"]}
    assert by_name["legal-0"]["gain_by_domain"] == pytest.approx({"legal": 0.5, "code": -0.1})
    assert next(iter(verdict["standings"]))["candidate"] == "concat x2"


def test_if_all_forget_too_much_the_least_is_shipped_and_it_is_said():
    verdict = judge(scores(BITS), forgetting_at_most=0.001)
    assert verdict["chosen"] == "concat x1"
    assert "all forget more" in verdict["reason"]


def test_intervals_hold_zero_for_noise_and_not_for_a_difference():
    noisy = scores({"base": (3.0, 2.0, 1.0), "one": (2.5, 1.8, 1.0), "other": (2.5, 1.8, 1.0)}, noise=0.05)
    verdict = judge(noisy, forgetting_at_most=1.0)
    assert verdict["gain"]["low"] > 0.3
    rival = next(iter(verdict["over"].values()))
    assert rival["low"] <= 0.02
    assert rival["high"] >= 0.0


def test_clusters_are_drawn_whole_so_that_copies_add_no_certainty():
    rows = scores({"base": (3.0, 2.0, 1.0), "one": (2.8, 1.9, 1.0)}, num_documents=8, noise=0.1)
    copies = [r | {"document": f"{r['document']}-{i}", "cluster": r["document"]} for r in rows for i in range(10)]
    one, other = (judge(r, forgetting_at_most=1.0)["gain"] for r in (rows, copies))
    assert other["high"] - other["low"] == pytest.approx(one["high"] - one["low"], rel=1e-6)


def test_candidates_scored_on_other_documents_are_refused():
    rows = scores(BITS)
    with pytest.raises(DataError, match="different documents of legal"):
        judge([r for r in rows if (r["candidate"], r["document"]) != ("concat x1", "legal-3")], forgetting_at_most=1)
    with pytest.raises(DataError, match="needs scores of 'base'"):
        judge([r for r in rows if r["candidate"] != "base"], forgetting_at_most=1)


def test_the_front_keeps_equals_and_drops_the_dominated():
    standings = [Standing(n, g, f, {}) for n, g, f in (("a", 1, 1), ("b", 1, 1), ("c", 1, 2), ("d", 2, 3))]
    assert [s.candidate for s in pareto_front(standings) if s.on_front] == ["a", "b", "d"]


def test_candidates_are_every_method_at_every_scale():
    found = candidates(MergeConfig(rank=8), [MergeMethod.svd, MergeMethod.ties], [1.0, 1.5])
    assert list(found) == ["svd x1", "svd x1.5", "ties x1", "ties x1.5"]
    assert found["ties x1.5"].scale == 1.5
    assert found["ties x1.5"].rank == 8


def test_a_gain_of_nothing_is_told():
    standings = [Standing(name, gain, 0.0, {}) for name, gain in (("a", -0.2), ("b", -0.1))]
    assert choose(standings, 0.1) == (
        "b",
        "most gain of 2 that forget at most 0.1 bits per byte, and that is none: the base alone does as well",
    )
