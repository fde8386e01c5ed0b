"""The report's section on the data: what was kept and what not, how it was dealt out, how long it is, how it packs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Section, Table, union_table
from qlora_dist.evaluate.summary import Row, RunView, mapping, number

PARTS = ("train", "validation", "test")
LENGTHS = ("records", "least", "median", "p90", "p99", "most")
TEXT = (
    "Records are counted after copies were dropped and held-out text was searched for; lengths are tokens of a record."
)


def data(run: RunView) -> Section | None:
    """Shows records, rejects, shards, token lengths and how full the packed rows are."""
    section = Section("Data", TEXT)
    tables = (_records(run), _origins(run), _rejects(run), _replaced(run), _shards(run))
    section.tables += [t for t in tables if t is not None]
    _add_lengths(section, run)
    section.tables += union_table("Packed rows", "rows", list(_rows(run)))
    return section if section.tables else None


def _records(run: RunView) -> Table | None:
    columns = ["domain", "read", "train", "validation", "test", "left out", "dropped", "broken", "kinds"]
    rows = []
    for node in run.nodes_of("splits"):
        facts, split = node.facts, mapping(node.facts.get("splits"))
        counts = [number(mapping(split.get(part)).get("records")) for part in PARTS]
        left_out = sum(v for v in mapping(facts.get("left_out")).values() if number(v) is not None)
        rows.append([node.label, facts.get("kept"), *counts, left_out, facts.get("dropped"), facts.get("broken"),
                     facts.get("kinds")])  # fmt: skip
    return Table("Records", columns, rows) if rows else None


def _origins(run: RunView) -> Table | None:
    """Counts the records of each source and each licence, by split."""
    rows: list[list[Any]] = []
    for node in run.nodes_of("splits"):
        counts = [mapping(mapping(node.facts.get("splits")).get(part)) for part in PARTS]
        names = {name: None for found in counts for name in sorted(found) if name.startswith(("source ", "licence "))}
        for name in sorted(names, reverse=True):
            kind, _, own = name.partition(" ")
            shown = _path_of(run, node.label, own) if kind == "source" else own
            rows.append([node.label, kind, shown, *(found.get(name, 0) for found in counts)])
    return Table("Where records come from", ["domain", "by", "name", *PARTS], rows) if rows else None


def _path_of(run: RunView, domain: str, number: str) -> str:
    config = mapping(run.config.get("domain")).get(domain) or run.config.get(domain)
    sources = mapping(config).get("sources")
    found = (
        sources[int(number)] if isinstance(sources, list) and number.isdigit() and int(number) < len(sources) else {}
    )
    return str(mapping(found).get("path") or number)


def _replaced(run: RunView) -> Table | None:
    """Counts the personal data that were replaced, by what they were."""
    rows = [
        [node.label, *pair] for node in run.nodes_of("splits") for pair in mapping(node.facts.get("replaced")).items()
    ]
    return Table("Personal data replaced", ["domain", "what", "times"], rows) if rows else None


def _rejects(run: RunView) -> Table | None:
    """Counts what isn't trained on, by reason: while reading, while splitting, while packing."""
    rows: list[list[Any]] = []
    for node in run.nodes_of("splits"):
        rows += [[node.label, "read", reason, num] for reason, num in mapping(node.facts.get("reasons")).items()]
    for node in run.nodes_of("splits", "rows"):
        left_out = mapping(node.facts.get("left_out"))
        rows += [[node.label, "split" if node.stage == "splits" else "packed", *pair] for pair in left_out.items()]
    rows.sort(key=lambda row: str(row[0]))
    return Table("Not trained on, by reason", ["domain", "when", "reason", "records"], rows) if rows else None


def _shards(run: RunView) -> Table | None:
    rows = []
    for node in run.nodes_of("shards"):
        records, tokens = (_list(node.facts.get(key)) for key in ("records", "tokens"))
        rows += [[f"{node.label}-{i}", *pair] for i, pair in enumerate(zip(records, tokens, strict=False))]
    return Table("Shards", ["shard", "records", "tokens"], rows) if rows else None


def _add_lengths(section: Section, run: RunView) -> None:
    told = {node.label: mapping(node.facts.get("lengths")) for node in run.nodes_of("rows")}
    found = {label: row for label, row in told.items() if number(row.get("records"))}
    curves = {}
    for label, row in found.items():
        histogram = mapping(row.get("histogram"))
        edges, counts = _list(histogram.get("edges")), _list(histogram.get("counts"))
        if len(edges) == len(counts) + 1 and sum(counts):
            shares = [100 * count / sum(counts) for count in counts]
            curves[label] = (edges, [*shares, shares[-1]])
    rows = [[label, *(row.get(key) for key in LENGTHS)] for label, row in found.items()]
    if curves:
        title = "Tokens of a record"
        drawn = figures.lines(curves, title, "tokens", "% of the records", steps=True, log_x=True)
        section.draw("lengths", drawn, Table(title, ["rows", *LENGTHS], rows))


def _rows(run: RunView) -> Iterator[tuple[str, Row]]:
    for node in run.nodes_of("rows"):
        wanted = ("records", "segments", "tokens", "trained_tokens", "trained_share", "rows", "fill")
        yield node.label, {key: node.facts[key] for key in wanted if key in node.facts}


def _list(value: Any) -> list[Any]:
    return [v for v in value if number(v) is not None] if isinstance(value, list) else []
