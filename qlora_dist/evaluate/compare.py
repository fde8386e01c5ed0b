"""Every model against the base, on the same documents: paired differences, corrected for how many were tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.evaluate.documents import MEASURES, Document, read_documents
from qlora_dist.evaluate.statistics import Estimate, estimate_ratio, holm

BASE = "base"


def compare_models(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Returns a row for each model but the base, held-out set and measure: its difference from the base.

    Args:
        folders: the artifact of stage `scores` of each model, by the model's name; without `base` nothing is compared.
    """
    documents = {name: read_documents(folder) for name, folder in folders.items()}
    if BASE not in documents:
        return []
    rows = [
        row
        for name, theirs in documents.items()
        if name != BASE
        for metric in MEASURES
        for row in _differences(name, metric, theirs, documents[BASE])
    ]
    return list(_corrected(rows))


def _differences(
    model: str, metric: str, theirs: Iterable[Document], base: Iterable[Document]
) -> Iterable[dict[str, Any]]:
    known = {(d.domain, d.split, d.record): d for d in base}
    pairs = [(d, known[key]) for d in theirs if (key := (d.domain, d.split, d.record)) in known]
    for domain, split in sorted({(d.domain, d.split) for d, _ in pairs}):
        chosen = [(d, b) for d, b in pairs if (d.domain, d.split) == (domain, split)]
        if found := paired_difference(chosen, metric):
            yield {
                "model": model,
                "domain": domain,
                "split": split,
                "metric": metric,
                "difference": found.value,
                "low": found.low,
                "high": found.high,
                "p_value": found.p_value,
                "minimal_detectable": found.minimal_detectable,
                "num_documents": len(chosen),
            }


def paired_difference(pairs: list[tuple[Document, Document]], metric: str) -> Estimate | None:
    """Returns the first's measure minus the second's over the same documents; negative is better here."""
    top, bottom = MEASURES[metric]
    tops = np.array([getattr(d, top) - getattr(b, top) for d, b in pairs], dtype=np.float64)
    bottoms = np.array([getattr(d, bottom) for d, _ in pairs], dtype=np.float64)
    clusters = np.array([d.cluster for d, _ in pairs])
    return estimate_ratio(tops, bottoms, clusters) if bottoms.sum() else None


def _corrected(rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Adds Holm's p-value over the models that were tried on the same set with the same measure."""
    for key in dict.fromkeys((r["domain"], r["split"], r["metric"]) for r in rows):
        family = [r for r in rows if (r["domain"], r["split"], r["metric"]) == key]
        tested = [r for r in family if r["p_value"] is not None]
        for row, p in zip(tested, holm([r["p_value"] for r in tested]), strict=True):
            row["p_holm"] = p
        yield from family
