from __future__ import annotations

from typing import Any

import pytest


def score(model: str, domain: str, metric: str, value: float, reach: float | None = 0.1) -> dict[str, Any]:
    ends = {"low": None, "high": None} if reach is None else {"low": value - reach, "high": value + reach}
    return {"model": model, "domain": domain, "split": "test", "metric": metric, "value": value, **ends,
            "num_documents": 12}  # fmt: skip


@pytest.fixture
def summary() -> dict[str, Any]:
    """A finished run's summary, as `pipeline.close` writes it."""
    scores = [
        score(model, domain, metric, value)
        for metric in ("bits_per_byte", "completion_loss")
        for model, value in (("base", 3.2), ("legal-0", 2.6), ("merged", 2.4))
        for domain in ("legal", "general")
    ]
    curve = [{"step": i, "loss": 5 / (1 + i), "learning_rate": 1e-4, "tokens_per_s": 900.0} for i in range(1, 9)]
    merged = {
        "parts": [
            {"label": "legal-0", "weight": 0.5, "lora_rank": 8},
            {"label": "legal-1", "weight": 0.5, "lora_rank": 8},
        ],
        "cosines": [[1.0, 0.31], [0.31, 1.0]],
        "norm": 1.23,
    }
    checks = [
        {"check": "trained share", "passed": True, "value": 0.97},
        {"check": "moved", "passed": True, "value": 1.0},
    ]
    nodes = [
        {"stage": "records", "label": "legal-0", "key": "a1", "state": "cached", "seconds": 1.5,
         "facts": {"num_records": 180, "num_rejects": 2, "reasons": {"empty": 2}}},
        {"stage": "adapter", "label": "legal-0", "key": "b2", "state": "done", "seconds": 61.0,
         "facts": {"trained_tokens": 123456, "certificate": checks}},
        {"stage": "merged", "label": "all", "key": "c3", "state": "done", "seconds": 0.4, "facts": merged},
    ]  # fmt: skip
    return {
        "experiment": "legal",
        "command": "python -m qlora_dist.launch +experiment=legal",
        "config": {
            "seed": 17,
            "lora": {"lora_rank": 8, "target_modules": []},
            "domain": {"legal": {"sources": [{"path": "x"}]}},
        },
        "state": "done",
        "nodes": nodes,
        "scores": scores,
        "curves": {"legal-0": curve, "tiny": curve[:3]},
        "adapter": "runs/legal/adapter",
        "use": "python -m qlora_dist.chat --adapter runs/legal/adapter",
        "notes": [],
        "commit": "0123abc",
        "package_versions": {"torch": "2.13.0"},
        "hardware": {"cores": 2},
    }
