"""Stage `winner`: of a shard's trials one is chosen by development data, and its adapter is what the folder holds.

It stands in the pipeline, as the referee does: what trains and what measures don't know each other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_dist.config.stages import WinnerConfig
from qlora_dist.config.sweep import TrialConfig, swept_values
from qlora_dist.errors import TrainError
from qlora_dist.runtime import Facts, write_json

ADAPTER, SCORES, BASE = "adapter-", "scores-", "base"
SWEEP_FILE = "sweep.json"
LOST = "lost"
"""The fact of a trial's adapter, and of its scores, that says why there are none: its loss was no number any more."""


def choose_trial(config: WinnerConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Leaves the chosen trial's PEFT folder in `out`, and what all of them came to in `sweep.json`.

    Inputs are `adapter-<trial>` and `scores-<trial>` of each trial, and `scores-base`, all on development data. A
    trial whose training was lost is told as such, and one of the others is chosen.

    Raises:
        DataError: if the domain or `general` has no development data.
        TrainError: if all trials were lost.
    """
    from qlora_dist.evaluate.documents import read_documents
    from qlora_dist.evaluate.trials import choose_among

    facts = {t.name: adapter_facts(inputs[ADAPTER + t.name]) for t in config.trials}
    lost = {name: str(told[LOST]) for name, told in facts.items() if LOST in told}
    if len(lost) == len(config.trials):
        keys = ", ".join(f"sweep.{name}" for name in varied_among(config.trials)) or "the sweep"
        raise TrainError(f"All {len(lost)} trials were lost. {_told(lost)}. Change {keys}, or what all of them share.")
    documents = {t.name: read_documents(inputs[SCORES + t.name]) for t in config.trials if t.name not in lost}
    base = read_documents(inputs[SCORES + BASE])
    verdict = choose_among(config.trials, documents, base, config.domain, config.max_forgetting)
    rows = {row["trial"]: row | {"state": "finished"} for row in verdict["trials"]}
    rows |= {name: {"trial": name, "state": LOST, "why": why} for name, why in lost.items()}
    told = [rows[t.name] | {"tokens": facts[t.name].get("tokens", 0)} for t in config.trials]
    if lost:
        verdict["reason"] += f" {len(lost)} of {len(config.trials)} trials were lost. {_told(lost)}."
    keep_adapter(inputs[ADAPTER + verdict["winner"]], out)
    return write_verdict(out, config.domain, config.trials, verdict | {"trials": told})


def _told(lost: Mapping[str, str]) -> str:
    """Says why the first trial was lost, and names the others."""
    (name, why), *others = lost.items()
    return f"{name}: {why.rstrip('.')}" + (f"; so was {', '.join(n for n, _ in others)}" if others else "")


def varied_among(trials: Sequence[TrialConfig]) -> list[str]:
    """Returns the fields in which trials differ."""
    settings = [swept_values(trial) for trial in trials]
    return [name for name in settings[0] if len({repr(values[name]) for values in settings}) > 1]


def write_verdict(out: Path, domain: str, trials: list[TrialConfig], verdict: dict[str, Any]) -> Facts:
    """Writes `sweep.json`: the verdict, each trial's row with its settings, and the tokens that were spent."""
    settings = {trial.name: swept_values(trial) for trial in trials}
    varied = varied_among(trials)
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
