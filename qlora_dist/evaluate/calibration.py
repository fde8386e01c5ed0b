"""Expected calibration error: how far the model's confidence in its likeliest token is from being right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dist.evaluate.likelihood import Slots
from qlora_dist.runtime import write_json

NUM_BINS = 15
CALIBRATION_FILE = "calibration.json"
SUMS = ("confidence", "correct", "count")


class Calibration:
    """Sums of confidence and correctness in equal bins of confidence (Guo et al., arXiv 1706.04599, equation 3)."""

    def __init__(self) -> None:
        self.confidence = np.zeros(NUM_BINS)
        self.correct = np.zeros(NUM_BINS)
        self.count = np.zeros(NUM_BINS)
        self.num_documents = 0

    def add(self, slots: Slots, trained_BT: NDArray[np.bool_]) -> None:
        """Adds the targets of some rows."""
        confidence_N, correct_N = slots.confidence_BT[trained_BT], slots.correct_BT[trained_BT]
        bin_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
        self.confidence += np.bincount(bin_N, confidence_N, NUM_BINS)
        self.correct += np.bincount(bin_N, correct_N, NUM_BINS)
        self.count += np.bincount(bin_N, minlength=NUM_BINS)

    def sums(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {name: getattr(self, name).tolist() for name in SUMS} | {"num_documents": self.num_documents}

    def bins(self) -> dict[str, list[float]]:
        """Returns the mean confidence and accuracy of each bin that holds targets, and how many it holds."""
        filled = self.count > 0
        count = self.count[filled]
        means = {"confidence": self.confidence[filled] / count, "accuracy": self.correct[filled] / count}
        return {name: np.round(values, 5).tolist() for name, values in {**means, "count": count}.items()}

    def error(self) -> float:
        """Returns the mean distance between confidence and accuracy, weighted by the targets of each bin."""
        return float(np.abs(self.confidence - self.correct).sum() / max(1.0, self.count.sum()))


def calibration_rows(model: str, split: str, found: Mapping[str, Calibration]) -> list[dict[str, Any]]:
    """Returns the score row of each domain; a sum over bins has no interval by document."""
    return [
        {
            "model": model,
            "domain": domain,
            "split": split,
            "metric": "calibration_error",
            "value": calibration.error(),
            "low": None,
            "high": None,
            "num_documents": calibration.num_documents,
        }
        for domain, calibration in found.items()
    ]


def write_calibration(found: Mapping[str, Calibration], folder: Path) -> None:
    """Writes the sums of every bin, by domain."""
    write_json(folder / CALIBRATION_FILE, {domain: calibration.sums() for domain, calibration in found.items()})


def read_calibration(folder: Path) -> dict[str, Calibration]:
    """Reads what `write_calibration` wrote."""
    found = {}
    for domain, sums in json.loads((folder / CALIBRATION_FILE).read_text(encoding="utf-8")).items():
        found[domain] = Calibration()
        found[domain].num_documents = sums["num_documents"]
        for name in SUMS:
            setattr(found[domain], name, np.array(sums[name]))
    return found
