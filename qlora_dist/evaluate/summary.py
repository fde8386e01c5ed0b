"""A run's summary as the report reads it: every part has its type, and a part that is absent or odd is empty.

The report on a broken run is the one that is needed most, so nothing here raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

GENERAL = "general"


@dataclass(kw_only=True, frozen=True, slots=True)
class NodeView:
    """One node of the run: what it was, how it ended, and what its stage function found."""

    stage: str = ""
    label: str = ""
    key: str = ""
    artifact: str = ""
    state: str = ""
    seconds: float | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    num_gpus: float = 0
    peak_bytes: float = 0
    error: str = ""
    log: str = ""
    facts: Row = field(default_factory=dict)


@dataclass(kw_only=True, frozen=True, slots=True)
class RunView:
    """What a run left behind, ready to be shown."""

    experiment: str = "run"
    command: str = ""
    use: str = ""
    adapter: str = ""
    state: str = "unknown"
    notes: tuple[str, ...] = ()
    config: Row = field(default_factory=dict)
    nodes: tuple[NodeView, ...] = ()
    scores: tuple[Row, ...] = ()
    comparisons: tuple[Row, ...] = ()
    verdict: Row = field(default_factory=dict)
    examples: tuple[Row, ...] = ()
    sweep: Row = field(default_factory=dict)
    sealed: tuple[Row, ...] = ()
    curves: dict[str, list[Row]] = field(default_factory=dict)
    circumstances: Row = field(default_factory=dict)

    def nodes_of(self, *stages: str) -> list[NodeView]:
        """Returns the nodes of some stages that have something to tell."""
        return [n for n in self.nodes if n.stage in stages and n.facts]


def view(summary: Mapping[str, Any]) -> RunView:
    """Reads a summary, leaving out what hasn't the form that `pipeline.close` writes."""
    curves = {str(label): list(_rows(rows, "step")) for label, rows in mapping(summary.get("curves")).items()}
    about = ("commit", "time", "hardware", "package_versions")
    return RunView(
        experiment=text(summary.get("experiment")) or "run",
        command=text(summary.get("command")),
        use=text(summary.get("use")),
        adapter=text(summary.get("adapter")),
        state=text(summary.get("state")) or "unknown",
        notes=tuple(str(n) for n in _list(summary.get("notes"))),
        config=mapping(summary.get("config")),
        nodes=tuple(_node(n) for n in _list(summary.get("nodes")) if isinstance(n, Mapping)),
        scores=_domains_first(_rows(summary.get("scores"), "value", "model", "domain", "metric")),
        comparisons=_domains_first(_rows(summary.get("comparisons"), "difference", "model", "domain", "metric")),
        verdict=mapping(summary.get("verdict")),
        examples=tuple(mappings(summary.get("examples"))),
        sweep=mapping(summary.get("sweep")),
        sealed=tuple(mappings(summary.get("sealed"))),
        curves={label: rows for label, rows in curves.items() if rows},
        circumstances={k: summary[k] for k in about if summary.get(k)},
    )


def number(value: Any) -> float | None:
    """Returns a finite number as it is, and None for all else: JSON knows no NaN, and a figure draws none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _node(node: Mapping[str, Any]) -> NodeView:
    texts = {k: text(node.get(k)) for k in ("stage", "label", "key", "artifact", "state", "error", "log")}
    return NodeView(
        **texts,
        seconds=number(node.get("seconds")),
        inputs={name: text(i) for name, i in mapping(node.get("inputs")).items()},
        num_gpus=number(node.get("gpus")) or 0,
        peak_bytes=number(node.get("peak_memory_bytes")) or 0,
        facts=mapping(node.get("facts")),
    )


def _rows(value: Any, measured: str, *named: str) -> Iterator[Row]:
    for row in _list(value):
        if isinstance(row, Mapping) and number(row.get(measured)) is not None:
            yield {**row, **{k: text(row.get(k)) for k in named}}


def _domains_first(rows: Iterator[Row]) -> tuple[Row, ...]:
    """Orders rows so that what the run was made for comes before what it may have forgotten."""
    return tuple(sorted(rows, key=lambda row: bool(row["domain"] == GENERAL)))


def mappings(value: Any) -> list[Row]:
    """Returns the mappings in a list, and [] for what is no list."""
    return [mapping(v) for v in _list(value) if isinstance(v, Mapping)]


def mapping(value: Any) -> Row:
    """Returns a mapping with its keys as text, and {} for what is none."""
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def text(value: Any) -> str:
    """Returns text as it is, a list joined, and "" for None."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
