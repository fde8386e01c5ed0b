"""What a run's sweep came to over all its shards, for its summary and report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_dist.pipeline.winner import SWEEP_FILE
from qlora_dist.runtime import Facts

METRIC = "validation_bits_per_byte"
CURVES = "curves"


def sweep_summary(folders: Mapping[str, Path]) -> Facts:
    """Returns the sweep's part of the summary: each shard's verdict, and each trial over all shards.

    Args:
        folders: the finished folder of stage `winner` or `halved` of each shard, by its label.
    """
    shards = {label: json.loads((f / SWEEP_FILE).read_text(encoding="utf-8")) for label, f in folders.items()}
    if not shards:
        return {}
    told = [f"{label}: {shard['winner']} is chosen. {shard['reason']}" for label, shard in shards.items()]
    full = [shard["grid_tokens"] for shard in shards.values() if "grid_tokens" in shard]
    summary: Facts = {
        "metric": METRIC,
        "text": " ".join(told),
        "trials": _over_shards(shards),
        "shards": [{"label": label, **shard} for label, shard in shards.items()],
        "tokens": sum(shard["tokens"] for shard in shards.values()),
    }
    return summary | ({"grid_tokens": sum(full)} if full else {})


def lane_curves(label: str, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Returns the training curve of each trial of a halved shard."""
    return {
        f"{label}.{path.stem}": [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((folder / CURVES).glob("*.jsonl"))
    }


def _over_shards(shards: Mapping[str, Mapping[str, Any]]) -> list[Facts]:
    """Returns a row for each trial: of one shard as it is, of several of a domain the means, and who chose it."""
    (first, *others) = shards.values()
    if not others:
        return [{"label": row["trial"], **{k: v for k, v in row.items() if k != "trial"}} for row in first["trials"]]
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for shard in shards.values():
        for row in shard["trials"]:
            rows.setdefault((shard["domain"], row["trial"]), []).append(row)
    several = len({domain for domain, _ in rows}) > 1
    measured = (METRIC, "forgetting", "over_best")
    made = []
    for (domain, name), found in rows.items():
        settings = {k: v for k, v in found[0].items() if k in first["columns"]}
        row = {"label": name, **settings, **{k: _mean([r.get(k) for r in found]) for k in measured}}
        row["tokens"] = sum(r["tokens"] for r in found)
        chosen_by = [shard for shard in shards.values() if (shard["domain"], shard["winner"]) == (domain, name)]
        made.append(row | {"chosen_by": len(chosen_by)} | ({"domain": domain} if several else {}))
    return made


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None
