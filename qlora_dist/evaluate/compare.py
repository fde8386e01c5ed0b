"""Every model against the base, on the same documents: paired differences, corrected for how many were tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.evaluate.answers import read_answers
from qlora_dist.evaluate.documents import MEASURES, read_documents
from qlora_dist.evaluate.harness import SPLIT, read_samples
from qlora_dist.evaluate.statistics import estimate_ratio, holm

BASE = "base"
OF_THE_BASE = {"token_kl"}
"""Measures that say of themselves how far a model is from the base."""


Sums = dict[tuple[str, str, str], dict[str, tuple[float, float, str]]]
"""By (domain, split, metric) and record: (top, bottom, cluster) of a ratio of sums."""


def compare_models(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Returns a row for each model but the base, held-out set and measure: its difference from the base.

    Args:
        folders: the artifact of stage `scores` of each model, by the model's name; without `base` nothing is compared.
    """
    sums = {name: read_sums(folder) for name, folder in folders.items()}
    base = sums.pop(BASE, {})
    rows = [
        {"model": model, "domain": key[0], "split": key[1], "metric": key[2], **row}
        for model, theirs in sums.items()
        for key in theirs.keys() & base.keys()
        if (row := _difference(theirs[key], base[key])) is not None
    ]
    order = {name: i for i, name in enumerate(sums)}
    rows.sort(key=lambda r: (r["domain"], r["metric"], order[r["model"]]))
    return list(_corrected(rows))


def read_sums(folder: Path) -> Sums:
    """Reads what stage `scores` kept of each document and answer, as terms of ratios."""
    found: Sums = {}
    for document in read_documents(folder):
        for metric, (top, bottom) in MEASURES.items():
            if metric in OF_THE_BASE:
                continue
            terms = (float(getattr(document, top)), float(getattr(document, bottom)), document.cluster)
            found.setdefault((document.domain, document.split, metric), {})[document.record] = terms
    for answer in read_answers(folder):
        for metric, value in answer.measures.items():
            found.setdefault((answer.domain, answer.split, metric), {})[answer.record] = (value, 1.0, answer.cluster)
    for sample in read_samples(folder):
        terms = (sample.top, sample.bottom, sample.document)
        found.setdefault((sample.task, SPLIT, sample.metric), {})[sample.document] = terms
    return found


def _difference(
    theirs: Mapping[str, tuple[float, float, str]], base: Mapping[str, tuple[float, float, str]]
) -> dict[str, Any] | None:
    """Estimates a model's measure minus the base's, over the documents that both have."""
    records = sorted(theirs.keys() & base.keys())
    tops = np.array([theirs[r][0] - base[r][0] for r in records], dtype=np.float64)
    bottoms = np.array([base[r][1] for r in records], dtype=np.float64)
    if not bottoms.sum():
        return None
    found = estimate_ratio(tops, bottoms, np.array([base[r][2] for r in records]))
    return {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "minimal_detectable": found.minimal_detectable,
        "num_documents": len(records),
    }


def _corrected(rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Adds Holm's p-value over the models that were tried on the same set with the same measure."""
    for key in dict.fromkeys((r["domain"], r["split"], r["metric"]) for r in rows):
        family = [r for r in rows if (r["domain"], r["split"], r["metric"]) == key]
        tested = [r for r in family if r["p_value"] is not None]
        for row, p in zip(tested, holm([r["p_value"] for r in tested]), strict=True):
            row["p_holm"] = p
        yield from family
