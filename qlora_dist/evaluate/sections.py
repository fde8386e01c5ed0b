"""The sections of a report, made from a run: what is there is shown, what isn't is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_dist.evaluate import data_sections, lineage_sections, scored_sections, sweep_sections, trained_sections
from qlora_dist.evaluate.page import Section, Table, is_scalar, union_table
from qlora_dist.evaluate.summary import RunView, mappings, number

TRAINED_STAGES = ("tiny", "adapter", "worker", "halved")
TOLD_STAGES = ("records", "tokenizer", "tiny", "base", "adapter", "worker", "merged", "chosen", "export")


def report_sections(run: RunView) -> list[Section]:
    """Returns every section that the run has something to say about, in reading order."""
    made = (
        outcome(run),
        scored_sections.scores(run),
        scored_sections.matrix(run),
        scored_sections.examples(run),
        scored_sections.forms(run),
        scored_sections.calibration(run),
        scored_sections.further(run),
        sweep_sections.sweep(run),
        trained_sections.curves(run),
        trained_sections.merge(run),
        trained_sections.certificate(run),
        trained_sections.pretraining(run),
        data_sections.data(run),
        cost(run),
        lineage_sections.lineage(run),
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
        Table("What failed", ["node", "why", "log"], failed),
        Table("Verdict", columns, [[r.get(c) for c in columns] for r in reasons]),
        scored_sections.at_a_glance(run),
    ]
    ended = "Every node finished." if run.state == "done" else f"{len(failed)} of {len(run.nodes)} nodes failed."
    shipped = f"The adapter is in {run.adapter}." if run.adapter else "No adapter was shipped."
    text = " ".join(part for part in (_verdict(run), ended, shipped, _sealed(run)) if part)
    return Section("Outcome", text, [t for t in tables if t.rows], code=run.use, notes=list(run.notes))


def _verdict(run: RunView) -> str:
    if not run.verdict:
        return ""
    failed = [str(r.get("check")) for r in mappings(run.verdict.get("reasons")) if not r.get("passed")]
    return "Verdict: ship." if run.verdict.get("ship") else f"Verdict: do not ship ({'; '.join(failed)})."


def _sealed(run: RunView) -> str:
    """Says whether the sealed test was read for this choice alone, or whether others came before."""
    if not run.sealed:
        return ""
    before = max(len(mappings(row.get("before"))) for row in run.sealed)
    if not before:
        return "The sealed test was read once, for this choice alone."
    return f"The sealed test had been read for other choices ({before}) before this one: see the notes."


def cost(run: RunView) -> Section | None:
    """Shows what the run took: seconds, GPU hours, trained tokens and peak memory by stage."""
    rows: list[list[Any]] = []
    for stage in dict.fromkeys(n.stage for n in run.nodes):
        nodes = [n for n in run.nodes if n.stage == stage]
        tokens = [t for n in nodes if (t := number(n.facts.get("tokens"))) is not None and stage in TRAINED_STAGES]
        peaks = [p for n in nodes for p in (number(n.facts.get("peak_memory_bytes")) or n.peak_bytes,) if p]
        seconds = sum(n.seconds or 0 for n in nodes)
        gpu_hours = sum((n.seconds or 0) * n.num_gpus for n in nodes) / 3600
        rows.append(
            [stage, len(nodes), seconds, gpu_hours, int(sum(tokens)) or None, max(peaks) / 2**30 if peaks else None]
        )
    if not rows:
        return None
    whole = [sum(row[i] or 0 for row in rows) for i in range(1, 5)]
    rows.append(["all", *whole[:3], whole[3] or None, max((row[5] for row in rows if row[5]), default=None)])
    columns = ["stage", "nodes", "seconds", "GPU hours", "trained tokens", "peak memory, GiB"]
    text = "Seconds of work, whoever's run did it: what is cached cost nothing this time."
    return Section("Cost", text, [Table("", columns, rows)])


def work(run: RunView) -> Section | None:
    """Shows what each stage reported of itself."""
    tables = [t for stage in TOLD_STAGES for t in _facts_table(run, stage)]
    return Section("What the stages said", tables=tables, folded=True) if tables else None


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
