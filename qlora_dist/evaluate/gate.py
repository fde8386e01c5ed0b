"""Ship or not: a verdict with its reasons, from thresholds that stand in the config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_dist.config.evaluate import EvaluateConfig, Gate
from qlora_dist.evaluate.compare import compare_models
from qlora_dist.evaluate.documents import SCORES_FILE
from qlora_dist.evaluate.examples import collect_examples
from qlora_dist.evaluate.terms import GENERAL


def assess(folders: Mapping[str, Path], shipped: str, domains: Sequence[str], config: EvaluateConfig) -> dict[str, Any]:
    """Returns what the summary says of a run's scores: `comparisons` with the base, `verdict` (or None), `examples`."""
    comparisons = compare_models(folders)
    judged = config.gate is not Gate.off and shipped in folders and "base" in folders
    scores = _scores(folders[shipped]) if judged and config.min_scores else []
    verdict = judge(shipped, domains, comparisons, scores, config) if judged else None
    return {"comparisons": comparisons, "verdict": verdict, "examples": collect_examples(folders)}


def judge(
    model: str,
    domains: Sequence[str],
    comparisons: Iterable[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Returns `{"model", "ship", "reasons"}`; every check is a reason, whether it passed or not.

    A domain passes when bits per byte fell by at least `min_gain`, and the interval leaves no doubt that they fell
    (too few documents for an interval leave it); a measure of `min_scores` passes where it is reached on every domain
    that has it; forgetting passes when bits per byte on `general` rose by at most `max_forgetting`.

    Args:
        model: the one that would be shipped.
        domains: those it was trained for.
        comparisons: rows of `compare_models`.
        scores: the model's own rows of stage `scores`.
        config: the thresholds.
    """
    found = {r["domain"]: r for r in comparisons if r["model"] == model and r["metric"] == "bits_per_byte"}
    reasons = [_gained(domain, found.get(domain), config.min_gain) for domain in domains]
    for metric, least in config.min_scores.items():
        reasons += _reached(metric, least, [r for r in scores if r["metric"] == metric and r["domain"] in domains])
    reasons.append(_forgot(found.get(GENERAL), config.max_forgetting))
    return {"model": model, "ship": all(r["passed"] for r in reasons), "reasons": reasons}


def _gained(domain: str, row: Mapping[str, Any] | None, least: float) -> dict[str, Any]:
    by = f"at least {least:g} " if least else ""
    wanted = f"bits per byte on {domain} {by}below the base, beyond doubt"
    if row is None:
        return _reason(f"better on {domain}", False, wanted, "not measured")
    sure = row["high"] is not None and row["high"] < 0
    passed = row["difference"] < 0 and row["difference"] <= -least and sure
    return _reason(f"better on {domain}", passed, wanted, _with_interval(row))


def _reached(metric: str, least: float, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a reason for each domain that has the measure; where none has it, it isn't reached."""
    wanted = f"{metric} at least {least:g}"
    if not rows:
        yield _reason(f"{metric} reached", False, wanted, "not measured")
    for row in rows:
        found = f"{row['value']:.4f} ({_ends(row)}documents: {row['num_documents']})"
        yield _reason(f"{metric} reached on {row['domain']}", row["value"] >= least, wanted, found)


def _ends(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}; "


def _scores(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))["rows"]
    return rows


def _forgot(row: Mapping[str, Any] | None, most: float) -> dict[str, Any]:
    wanted = f"bits per byte on {GENERAL} at most {most:g} above the base"
    if row is None:
        return _reason("little forgotten", False, wanted, "not measured")
    return _reason("little forgotten", row["difference"] <= most, wanted, _with_interval(row))


def _reason(check: str, passed: bool, wanted: str, found: str) -> dict[str, Any]:
    return {"check": check, "passed": passed, "wanted": wanted, "found": found}


def _with_interval(row: Mapping[str, Any]) -> str:
    interval = "too few for an interval" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
    return f"{row['difference']:+.4f} ({interval}; documents: {row['num_documents']})"
