"""The sealed test set is read once: the root's ledger says when it was, by which node, and for which choice.

Development data select; the test set judges what was selected. A test that has been looked at for one choice judges
the next one too kindly, so each reading leaves a file in `<root>/sealed/<the set>/`, whatever run it was made by.
"""

from __future__ import annotations

import json
import time
from typing import Any

from qlora_dist.artifacts.objects import Objects, is_url
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.runtime import log, rank, write_json

SEALED = "sealed"
TEST = "test"


def note_reading(plan: Plan, node: Node) -> None:
    """Writes to the ledger that a node reads the sealed sets now; nodes that read none are passed over.

    The same node again (killed, or run anew) is the same reading; its first time stays.
    """
    if rank() != 0 or not _reads_test(node):
        return
    for domain, sealed in _sets(plan, node).items():
        name = f"{_folder(sealed)}/{node.label}-{node.key}.json"
        if name in _names(plan, sealed):
            continue
        if others := _others(plan, sealed):
            log.warning("the sealed test of %s was read before, for %s", domain, others[0]["choice"])
        reading = {"domain": domain, "set": sealed, "model": node.label, "node": node.name, "key": node.key}
        reading |= {"adapter": node.inputs["adapter"], "choice": choice_of(plan)}
        reading |= {"experiment": plan.experiment, "command": plan.command, "time": _now()}
        _write(plan, name, reading)


def choice_of(plan: Plan) -> str:
    """Returns what a plan's scores judge: the merge that it ships, else all the models that it trains."""
    shipped = [node.id for node in plan.nodes if node.stage in {"chosen", "merged"}]
    return " + ".join(shipped or [node.id for node in plan.nodes if node.stage == "adapter"])


def sealed_sets(plan: Plan) -> list[dict[str, Any]]:
    """Returns each sealed set that the plan's scores read: when it was first, for which models, and who came before.

    A row is `{"domain", "set", "choice", "time", "models", "before"}`; `before` lists the readings for other choices
    that are older than this choice's own, `{"choice", "experiment", "time"}`.
    """
    rows = []
    named = {sets for node in plan.nodes if _reads_test(node) for sets in _sets(plan, node).items()}
    for domain, sealed in sorted(named, key=lambda pair: (pair[0] == "general", pair)):
        own = [r for r in _readings(plan, sealed) if r["choice"] == choice_of(plan)]
        if own:
            row = {"domain": domain, "set": sealed, "choice": choice_of(plan), "time": own[0]["time"]}
            before = [r for r in _others(plan, sealed) if r["time"] <= own[0]["time"]]
            firsts = {r["choice"]: r for r in reversed(before)}
            kept = [{k: r[k] for k in ("choice", "experiment", "time")} for r in reversed(firsts.values())]
            rows.append(row | {"models": list(dict.fromkeys(r["model"] for r in own)), "before": kept})
    return rows


def warnings_of(sets: list[dict[str, Any]]) -> list[str]:
    """Returns what a person must know of sealed sets that were read before: nothing when they were read once."""
    domains = [row["domain"] for row in sets if row["before"]]
    if not domains:
        return []
    before = {other["choice"]: other for row in sets for other in row["before"]}
    first = next(iter(before.values()))
    return [
        f"The sealed test of {', '.join(domains)} had been read for other choices ({len(before)}) before this one, "
        f"first for {first['choice']} of {first['experiment']} at {first['time']}. If their scores led to this choice, "
        "its own flatter it. Select with evaluate.split=validation, and let the test judge the last choice alone."
    ]


def _reads_test(node: Node) -> bool:
    """Says whether a node scores what was trained on a sealed set; the base's own scores favour no choice."""
    return node.stage == "scores" and "adapter" in node.inputs and node.config["evaluate"]["split"] == TEST


def _sets(plan: Plan, node: Node) -> dict[str, str]:
    """Returns the splits artifact of each domain: it holds the records, whatever rows were packed of them."""
    rows = {name.removeprefix("rows-"): plan.node(i) for name, i in node.inputs.items() if name.startswith("rows-")}
    return {domain: rows_node.inputs.get("splits", rows_node.id) for domain, rows_node in rows.items()}


def _folder(sealed: str) -> str:
    return f"{SEALED}/{sealed.replace('/', '-')}"


def _others(plan: Plan, sealed: str) -> list[dict[str, Any]]:
    return [reading for reading in _readings(plan, sealed) if reading["choice"] != choice_of(plan)]


def _readings(plan: Plan, sealed: str) -> list[dict[str, Any]]:
    """Returns the readings of a set, the oldest first."""
    found = [_read(plan, name) for name in _names(plan, sealed)]
    return sorted((reading for reading in found if reading), key=lambda reading: str(reading["time"]))


def _names(plan: Plan, sealed: str) -> list[str]:
    folder = _folder(sealed)
    if is_url(plan.root):
        return [f"{folder}/{name}" for name in Objects(plan.root).names(folder)]
    return [f"{folder}/{path.name}" for path in sorted((plan.staged_root / folder).glob("*.json"))]


def _read(plan: Plan, name: str) -> dict[str, Any]:
    if is_url(plan.root):
        return Objects(plan.root).read_json(name) or {}
    reading: dict[str, Any] = json.loads((plan.staged_root / name).read_text(encoding="utf-8"))
    return reading


def _write(plan: Plan, name: str, reading: dict[str, Any]) -> None:
    if is_url(plan.root):
        Objects(plan.root).create(name, json.dumps(reading, indent=2).encode())
        return
    path = plan.staged_root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, reading)


def _now() -> str:
    moment = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1000):03d}Z"
