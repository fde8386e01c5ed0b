"""Expected calibration error: how far the model's confidence in its likeliest token is from being right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qlora_dist.evaluate.likelihood import Slots

NUM_BINS = 15


class Calibration:
    """Sums of confidence and correctness in equal bins of confidence (Guo et al., arXiv 1706.04599, equation 3)."""

    def __init__(self) -> None:
        self.confidence = np.zeros(NUM_BINS)
        self.correct = np.zeros(NUM_BINS)
        self.count = np.zeros(NUM_BINS)

    def add(self, slots: Slots, trained_BT: NDArray[np.bool_]) -> None:
        """Adds the targets of some rows."""
        confidence_N, correct_N = slots.confidence_BT[trained_BT], slots.correct_BT[trained_BT]
        bin_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
        self.confidence += np.bincount(bin_N, confidence_N, NUM_BINS)
        self.correct += np.bincount(bin_N, correct_N, NUM_BINS)
        self.count += np.bincount(bin_N, minlength=NUM_BINS)

    def error(self) -> float:
        """Returns the mean distance between confidence and accuracy, weighted by the targets of each bin."""
        return float(np.abs(self.confidence - self.correct).sum() / max(1.0, self.count.sum()))
