"""Closing a run: one summary, one report and the shipped adapter, from what its artifacts hold."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qlora_dist.config.evaluate import EvaluateConfig
from qlora_dist.errors import disk_error
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.publish import fetch_word, publish
from qlora_dist.pipeline.run import circumstances
from qlora_dist.pipeline.sealed import sealed_sets, warnings_of
from qlora_dist.pipeline.swept import lane_curves, sweep_summary
from qlora_dist.runtime import write_json

SUMMARY = "summary.json"
FULL_BYTES = 1 << 16
"""A disk with less than this left is full: a node that died there could not say so."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a node ended: its state's name, how long it took here, and what went wrong."""

    state: str
    seconds: float = 0.0
    error: str = ""


def close_run(plan: Plan, endings: Mapping[str, Ending]) -> dict[str, Any]:
    """Writes `summary.json`, `report.html` and, when there is one to ship, `adapter/`; returns the summary."""
    shipped = _ship(plan, endings)
    sealed = sealed_sets(plan)
    summary = {
        "experiment": plan.experiment,
        "command": plan.command,
        "config": plan.config,
        "state": "done" if all(e.state in {"done", "cached"} for e in endings.values()) else "failed",
        "nodes": [_describe(plan, node, endings[node.name]) for node in plan.nodes],
        "scores": _scores(plan, endings),
        **_assessment(plan, endings),
        "sweep": sweep_summary(_halved(plan, endings) | _folders(plan, endings, "winner")),
        "curves": _curves(plan, endings),
        "adapter": str(shipped) if shipped else None,
        "use": use_command(plan, shipped) if shipped else "",
        "sealed": sealed,
        "notes": plan.notes + warnings_of(sealed),
        **{k: v for k, v in circumstances().items() if k in {"commit", "time"}},
        "package_versions": circumstances()["versions"],
        "hardware": circumstances()["machine"],
    }
    write_json(plan.folder / SUMMARY, summary)
    from qlora_dist.evaluate.report import write_report

    write_report(summary, plan.folder)
    publish(plan)
    return summary


def is_closed(plan: Plan) -> bool:
    """Says that this very plan was closed, with all of it done, and that its results lie there."""
    try:
        summary = json.loads((plan.folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    keys = [(n["stage"], n["label"], n["key"]) for n in summary["nodes"]]
    same = keys == [(n.stage, n.label, n.key) for n in plan.nodes] and summary["state"] == "done"
    same = same and summary["config"]["evaluate"] == plan.config["evaluate"]  # the gate's thresholds are in no key
    shipped = summary["adapter"]
    return bool(same and (plan.folder / "report.html").exists() and (not shipped or Path(shipped).is_dir()))


def use_command(plan: Plan, adapter: Path) -> str:
    """Returns the one command that talks to the shipped adapter on its base."""
    return f"python -m qlora_dist.chat --adapter {_short(adapter)}"


def serve_command(plan: Plan) -> str:
    """Returns the command that serves this root's shipped adapters to OpenAI's clients, by their names."""
    adapter = plan.folder / "adapter"
    return f"python -m qlora_dist.serve --folder {_short(plan.staged_root)} --adapter {_short(adapter)}"


def _short(path: Path) -> str:
    shown = Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    return shlex.quote(str(shown))


def _describe(plan: Plan, node: Node, ending: Ending) -> dict[str, Any]:
    described: dict[str, Any] = {
        "stage": node.stage,
        "label": node.label,
        "key": node.key,
        "artifact": node.id,
        "inputs": node.inputs,
        "state": ending.state,
        "seconds": round(ending.seconds, 1),
        "log": str(plan.log_path(node)),
    }
    if ending.state in {"done", "cached"}:
        manifest = plan.store.manifest(node.id)
        described |= {"seconds": manifest.seconds, "facts": manifest.facts, "folder": str(plan.store.folder(node.id))}
        described["gpus"] = min(node.world_size, manifest.made.get("gpus", 0))
        described["peak_memory_bytes"] = manifest.made.get("peak_memory_bytes")
    if ending.error:
        described["error"] = ending.error
    return described


def _finished(plan: Plan, endings: Mapping[str, Ending], stage: str) -> list[Node]:
    return [n for n in plan.nodes if n.stage == stage and endings[n.name].state in {"done", "cached"}]


def _scores(plan: Plan, endings: Mapping[str, Ending]) -> list[dict[str, Any]]:
    rows = []
    for node in _finished(plan, endings, "scores"):
        path = plan.store.fetch(node.id) / "scores.json"
        rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _assessment(plan: Plan, endings: Mapping[str, Ending]) -> dict[str, Any]:
    """Compares each model with the base, and judges the merged one by the config's thresholds."""
    from qlora_dist.evaluate.gate import assess

    folders = _folders(plan, endings, "scores")
    schema = OmegaConf.structured(EvaluateConfig)
    config = OmegaConf.to_object(OmegaConf.merge(schema, plan.config["evaluate"]))
    assert isinstance(config, EvaluateConfig)
    return assess(folders, "merged", list(plan.config["domain"]), config)


def _curves(plan: Plan, endings: Mapping[str, Ending]) -> dict[str, list[dict[str, float]]]:
    curves = {}
    for stage in ("tiny", "adapter", "worker"):
        for node in _finished(plan, endings, stage):
            path = plan.store.fetch(node.id) / "metrics.jsonl"
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                curves[node.label] = [json.loads(line) for line in lines]
    for label, folder in _halved(plan, endings).items():
        curves |= lane_curves(label, folder)
    return curves


def _halved(plan: Plan, endings: Mapping[str, Ending]) -> dict[str, Path]:
    return _folders(plan, endings, "halved")


def _folders(plan: Plan, endings: Mapping[str, Ending], stage: str) -> dict[str, Path]:
    return {node.label: plan.store.fetch(node.id) for node in _finished(plan, endings, stage)}


def _ship(plan: Plan, endings: Mapping[str, Ending]) -> Path | None:
    """Copies what is shipped to `adapter/`, aside and renamed; what an earlier plan shipped there goes away.

    Nothing is lost: every adapter stays among the artifacts.
    """
    merged = _finished(plan, endings, "merged") + _finished(plan, endings, "chosen")
    final, aside = plan.folder / "adapter", plan.folder / ".adapter"
    shutil.rmtree(aside, ignore_errors=True)
    if merged:
        ignored = shutil.ignore_patterns("manifest.json", ".*")
        shutil.copytree(plan.store.fetch(merged[0].id), aside, ignore=ignored)
    shutil.rmtree(final, ignore_errors=True)
    if not merged:
        return None
    aside.rename(final)
    return final


def ending_of(plan: Plan, node: Node, state: str, seconds: float) -> Ending:
    """Reads why a node failed, or says what is known when it left no word."""
    if state != "failed":
        return Ending(state, seconds)
    log = plan.log_path(node)
    fetch_word(plan, node)
    try:
        message = json.loads(plan.failure_path(node).read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError):
        if shutil.disk_usage(plan.staged_root).free < FULL_BYTES:
            return Ending(state, seconds, str(disk_error(OSError(errno.ENOSPC, ""), plan.staged_root)))
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        message = (
            f"The process ended without a word (killed, or out of memory?). Last line of the log: {(lines or [''])[-1]}"
        )
    return Ending(state, seconds, message)
