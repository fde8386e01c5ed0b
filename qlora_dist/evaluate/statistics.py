"""Intervals and tests over documents that are drawn by cluster, since near-copies share their luck.

Every measure here is a ratio of sums (bits over bytes, matches over documents), so one bootstrap serves all of
them, and the paired difference of two models too. Letters: C clusters, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_CLUSTERS = 10
"""With fewer, intervals of yes-or-no measures hold the truth less often than they say, so none is given."""

MIN_EFFECTIVE_CLUSTERS = 5
"""(Σb)² / Σb² over the clusters' denominators (Kish): below it a few long documents decide, and coverage is lost."""

NUM_RESAMPLES = 2000

POWER_FACTOR = 1.959964 + 0.841621
"""Normal quantiles of 97.5 % and 80 %: effect over standard error (Bloom, Evaluation Review 19, 1995)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio of sums, its interval and standard error; all but `value` are None with too few clusters for them."""

    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    error: float | None = None

    @property
    def minimal_detectable(self) -> float | None:
        """The smallest true value that a two-sided test at 5 % would find in 80 % of such samples."""
        return None if self.error is None else POWER_FACTOR * self.error


def estimate_ratio(
    tops: NDArray[np.float64],
    bottoms: NDArray[np.float64],
    clusters: NDArray[np.generic],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Returns sum(tops) / sum(bottoms) with a symmetric bootstrap-t interval over clusters.

    The studentised form keeps its coverage with few, uneven clusters, where percentiles are too narrow
    (Hall, The Bootstrap and Edgeworth Expansion, 1992, section 3.5); the standard error of a ratio is the
    linearised one (Cochran, Sampling Techniques, 1977, equation 6.13). The p-value is of "the ratio is 0".

    Args:
        tops: one numerator a document; for a paired difference, the difference of two models' numerators.
        bottoms: one denominator a document.
        clusters: the cluster of each document; clusters are drawn whole.
        level: the share of intervals that hold the true value.
        seed: of the resampling.
    """
    top_C, bottom_C = _by_cluster(tops, bottoms, clusters)
    value, error = _ratio(np.ones((1, len(top_C))), top_C, bottom_C)
    effective = bottom_C.sum() ** 2 / max(float((bottom_C**2).sum()), np.finfo(np.float64).tiny)
    if len(top_C) < MIN_CLUSTERS or effective < MIN_EFFECTIVE_CLUSTERS or not error[0] > 0:
        return Estimate(float(value[0]))
    ratio_S, error_S = _ratio(_resample(len(top_C), seed), top_C, bottom_C)
    valid_S = error_S > 0
    distance_S = np.abs(ratio_S[valid_S] - value[0]) / error_S[valid_S]
    reach = float(np.quantile(distance_S, level) * error[0])
    beyond = np.count_nonzero(distance_S >= abs(value[0]) / error[0])
    center = float(value[0])
    p_value = float((beyond + 1) / (len(distance_S) + 1))
    return Estimate(center, center - reach, center + reach, p_value, float(error[0]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number: all those below 0.05 hold at once with 95 % (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def _by_cluster(
    tops: NDArray[np.float64], bottoms: NDArray[np.float64], clusters: NDArray[np.generic]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    names, index = np.unique(clusters, return_inverse=True)
    sums = (np.bincount(index, values, len(names)).astype(np.float64) for values in (tops, bottoms))
    return next(sums), next(sums)


def _resample(num_clusters: int, seed: int) -> NDArray[np.float64]:
    drawn = np.random.default_rng(seed).multinomial(
        num_clusters, np.full(num_clusters, 1 / num_clusters), NUM_RESAMPLES
    )
    return drawn.astype(np.float64)


def _ratio(
    counts_SC: NDArray[np.float64], top_C: NDArray[np.float64], bottom_C: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns each resample's ratio [S] and its linearised standard error [S]."""
    num_clusters = len(top_C)
    bottom_S = np.maximum(counts_SC @ bottom_C, np.finfo(np.float64).tiny)
    ratio_S = counts_SC @ top_C / bottom_S
    squares_S = (
        counts_SC @ top_C**2 - 2 * ratio_S * (counts_SC @ (top_C * bottom_C)) + ratio_S**2 * (counts_SC @ bottom_C**2)
    )
    variance_S = np.maximum(squares_S, 0) * num_clusters / max(num_clusters - 1, 1)
    error_S = np.sqrt(variance_S) / bottom_S
    floor = 1e-9 * np.maximum(np.abs(ratio_S), 1e-300)  # below it, the residue of rounding
    return ratio_S, np.where(error_S > floor, error_S, 0.0)
