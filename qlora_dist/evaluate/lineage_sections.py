"""The report's section on lineage: every artifact with its key, and what each was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Figure, Section, Table
from qlora_dist.evaluate.summary import NodeView, RunView

GOOD = {"done", "cached"}
MAX_OF_STAGE = 8
"""Of a stage with more nodes than this, one point stands for all."""

MAX_DRAWN = 60
"""With more points still, those of each stage are drawn as one."""

TEXT = """What each artifact was made from, from the sources down. An artifact is named by its recipe: \
artifacts/<stage>/<label>-<key>."""


def lineage(run: RunView) -> Section | None:
    """Draws the plan as a graph, and lists every node with its key, inputs, state and time."""
    if not run.nodes:
        return None
    # An artifact bears its shard's label, not its trial's: a node is found by the artifact's own name.
    names = {n.artifact or f"{n.stage}/{n.label}-{n.key}": f"{n.stage}/{n.label}" for n in run.nodes}
    made_from = {f"{n.stage}/{n.label}": [names.get(i, i) for i in n.inputs.values()] for n in run.nodes}
    columns = ["artifact", "key", "made from", "state", "seconds"]
    rows = [[name, n.key, made_from[name], n.state, n.seconds] for n in run.nodes for name in [f"{n.stage}/{n.label}"]]
    section, table = Section("Lineage", TEXT), Table("Artifacts", columns, rows)
    if any(made_from.values()):
        section.draw("lineage", _drawn(run.nodes, made_from), table)
    else:
        section.tables.append(table)
    return section


def _drawn(nodes: Sequence[NodeView], made_from: Mapping[str, Sequence[str]]) -> Figure:
    """Draws each node, those of a stage that has many as one; of very many nodes, those of every stage as one."""
    stage_of = {f"{n.stage}/{n.label}": n.stage for n in nodes}
    counts = Counter(stage_of.values())
    num_drawn = sum(1 if count > MAX_OF_STAGE else count for count in counts.values())
    most = MAX_OF_STAGE if num_drawn <= MAX_DRAWN else 1
    title = {name: f"{stage} × {counts[stage]}" if counts[stage] > most else name for name, stage in stage_of.items()}
    merged: dict[str, dict[str, None]] = {drawn: {} for drawn in title.values()}
    for name, parents in made_from.items():
        found = (title[parent] for parent in parents if parent in title)
        merged[title[name]] |= {parent: None for parent in found if parent != title[name]}
    good = {drawn: all(n.state in GOOD for n in nodes if title[f"{n.stage}/{n.label}"] == drawn) for drawn in merged}
    return figures.graph(_in_order(merged), good, "What was made from what")


def _in_order(made_from: Mapping[str, Mapping[str, None]]) -> dict[str, list[str]]:
    """Puts parents before their children; what was drawn as one may stand in another order than its nodes."""
    try:
        order = list(TopologicalSorter(made_from).static_order())
    except CycleError:
        order = list(made_from)
    return {name: list(made_from[name]) for name in order}
