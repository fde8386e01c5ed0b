"""Stage `winner`: of a shard's trials one is chosen by development data, and its adapter is what the folder holds.

It stands in the pipeline, as the referee does: what trains and what measures don't know each other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dist.config.stages import WinnerConfig
from qlora_dist.config.sweep import TrialConfig, swept_values
from qlora_dist.runtime import Facts, write_json

ADAPTER, SCORES, BASE = "adapter-", "scores-", "base"
SWEEP_FILE = "sweep.json"


def choose_trial(config: WinnerConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Leaves the chosen trial's PEFT folder in `out`, and what all of them came to in `sweep.json`.

    Inputs are `adapter-<trial>` and `scores-<trial>` of each trial, and `scores-base`, all on development data.

    Raises:
        DataError: if the domain or `general` has no development data.
    """
    from qlora_dist.evaluate.documents import read_documents
    from qlora_dist.evaluate.trials import choose_among

    documents = {t.name: read_documents(inputs[SCORES + t.name]) for t in config.trials}
    base = read_documents(inputs[SCORES + BASE])
    verdict = choose_among(config.trials, documents, base, config.domain, config.max_forgetting)
    facts = {t.name: adapter_facts(inputs[ADAPTER + t.name]) for t in config.trials}
    rows = [row | {"state": "finished", "tokens": facts[row["trial"]].get("tokens", 0)} for row in verdict["trials"]]
    keep_adapter(inputs[ADAPTER + verdict["winner"]], out)
    return write_verdict(out, config.domain, config.trials, verdict | {"trials": rows})


def write_verdict(out: Path, domain: str, trials: list[TrialConfig], verdict: dict[str, Any]) -> Facts:
    """Writes `sweep.json`: the verdict, each trial's row with its settings, and the tokens that were spent."""
    settings = {trial.name: swept_values(trial) for trial in trials}
    varied = [name for name in next(iter(settings.values())) if len({repr(s[name]) for s in settings.values()}) > 1]
    shown = ["lora_rank", "lora_alpha", "learning_rate"]
    columns = [*shown, *(name for name in varied if name not in shown)]
    rows = [
        {"trial": row["trial"], **{name: settings[row["trial"]][name] for name in columns}, **row}
        for row in verdict["trials"]
    ]
    told = verdict | {"trials": rows, "domain": domain, "varied": varied, "columns": columns}
    told |= {"tokens": sum(row["tokens"] for row in rows)}
    write_json(out / SWEEP_FILE, told)
    return told


def keep_adapter(folder: Path, out: Path) -> None:
    """Copies an adapter's files: all but its manifest and its metrics."""
    ignored = shutil.ignore_patterns("manifest.json", ".*", "metrics.jsonl", "checkpoints")
    shutil.copytree(folder, out, ignore=ignored, dirs_exist_ok=True)


def adapter_facts(folder: Path) -> Facts:
    """Returns what the manifest of a finished adapter says."""
    facts: Facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["facts"]
    return facts
