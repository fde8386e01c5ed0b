"""The sections of a report, made from a run: what is there is shown, what isn't is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_dist.evaluate import scored_sections, sweep_sections, trained_sections
from qlora_dist.evaluate.page import Section, Table, is_scalar, union_table
from qlora_dist.evaluate.summary import RunView, mappings, number

TRAINED_STAGES = ("tiny", "adapter")
DATA_STAGES = ("records", "splits", "shards", "tokenizer", "rows")


def report_sections(run: RunView) -> list[Section]:
    """Returns every section that the run has something to say about, in reading order."""
    made = (
        outcome(run),
        scored_sections.scores(run),
        scored_sections.matrix(run),
        scored_sections.examples(run),
        scored_sections.further(run),
        sweep_sections.sweep(run),
        trained_sections.curves(run),
        trained_sections.merge(run),
        trained_sections.certificate(run),
        data(run),
        cost(run),
        work(run),
        settings(run),
    )
    return [section for section in made if section is not None]


def outcome(run: RunView) -> Section:
    """Says first how the run ended, what is shipped, how to use it, and what moved against the base."""
    failed = [[f"{n.stage}/{n.label}", n.error, n.log] for n in run.nodes if n.state == "failed"]
    reasons = mappings(run.verdict.get("reasons"))
    columns = ["check", "passed", "wanted", "found"]
    tables = [
        Table("Verdict", columns, [[r.get(c) for c in columns] for r in reasons]),
        Table("What failed", ["node", "why", "log"], failed),
        Table("Notes", ["note"], [[note] for note in run.notes]),
    ]
    ended = "Every node finished." if run.state == "done" else f"{len(failed)} of {len(run.nodes)} nodes failed."
    shipped = f"The adapter is in {run.adapter}." if run.adapter else "No adapter was shipped."
    text = " ".join(part for part in (_verdict(run), ended, shipped) if part)
    return Section("Outcome", text, [t for t in tables if t.rows], code=run.use)


def _verdict(run: RunView) -> str:
    if not run.verdict:
        return ""
    failed = [str(r.get("check")) for r in mappings(run.verdict.get("reasons")) if not r.get("passed")]
    return "Verdict: ship." if run.verdict.get("ship") else f"Verdict: do not ship ({'; '.join(failed)})."


def cost(run: RunView) -> Section | None:
    """Shows what the run took: seconds, trained tokens and peak memory by stage."""
    rows = []
    for stage in dict.fromkeys(n.stage for n in run.nodes):
        nodes = [n for n in run.nodes if n.stage == stage]
        tokens = [t for n in nodes if (t := number(n.facts.get("tokens"))) is not None and stage in TRAINED_STAGES]
        peaks = [p for n in nodes if (p := number(n.facts.get("peak_memory_bytes"))) is not None]
        seconds = sum(n.seconds or 0 for n in nodes)
        rows.append([stage, len(nodes), seconds, int(sum(tokens)) or None, max(peaks) / 2**30 if peaks else None])
    columns = ["stage", "nodes", "seconds", "trained tokens", "peak memory, GiB"]
    return Section("Cost", tables=[Table("", columns, rows)], folded=True) if rows else None


def data(run: RunView) -> Section | None:
    """Shows what the data stages counted: records, rejects, splits, rows, fill."""
    tables = [t for stage in DATA_STAGES for t in _facts_table(run, stage)]
    return Section("Data", tables=tables) if tables else None


def work(run: RunView) -> Section | None:
    """Shows every node with its key, state and time, and what the trainings reported of themselves."""
    nodes = [[n.stage, n.label, n.key, n.state, n.seconds] for n in run.nodes]
    tables = [Table("Nodes", ["stage", "label", "key", "state", "seconds"], nodes)] if nodes else []
    tables += [t for stage in ("tiny", "base", "adapter") for t in _facts_table(run, stage)]
    return Section("What was run", tables=tables, folded=True) if tables else None


def settings(run: RunView) -> Section | None:
    """Shows the command, the whole config, and the circumstances: commit, versions, hardware."""
    tables = [
        Table("Config", ["key", "value"], [list(pair) for pair in _flat(run.config)]),
        Table("Circumstances", ["what", "value"], [list(pair) for pair in _flat(run.circumstances)]),
    ]
    section = Section("Command and config", tables=[t for t in tables if t.rows], code=run.command, folded=True)
    return section if section.tables or section.code else None


def _facts_table(run: RunView, stage: str) -> list[Table]:
    return union_table(stage, "label", [(n.label, n.facts) for n in run.nodes_of(stage)])


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and not all(is_scalar(v) for v in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{i}]")
    elif value is not None and value != "":
        yield key, value
