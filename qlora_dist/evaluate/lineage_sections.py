"""The report's section on lineage: every artifact with its key, and what each was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Figure, Section, Table
from qlora_dist.evaluate.summary import NodeView, RunView

GOOD = {"done", "cached"}
MAX_DRAWN = 60
"""With more nodes, those of one stage are drawn as one."""

TEXT = """What each artifact was made from, from the sources down. An artifact is named by its recipe: \
artifacts/<stage>/<label>-<key>."""


def lineage(run: RunView) -> Section | None:
    """Draws the plan as a graph, and lists every node with its key, inputs, state and time."""
    if not run.nodes:
        return None
    names = {f"{n.stage}/{n.label}-{n.key}": f"{n.stage}/{n.label}" for n in run.nodes}
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
    good = {f"{n.stage}/{n.label}": n.state in GOOD for n in nodes}
    if len(nodes) <= MAX_DRAWN:
        return figures.graph(made_from, good, "What was made from what")
    stage_of = {f"{n.stage}/{n.label}": n.stage for n in nodes}
    counts = {stage: sum(s == stage for s in stage_of.values()) for stage in dict.fromkeys(stage_of.values())}
    title = {stage: f"{stage} × {count}" for stage, count in counts.items()}
    merged: dict[str, list[str]] = {title[stage]: [] for stage in counts}
    for name, parents in made_from.items():
        for parent in parents:
            if parent in stage_of and stage_of[parent] != stage_of[name]:
                merged[title[stage_of[name]]].append(title[stage_of[parent]])
    all_good = {title[stage]: all(good[n] for n in good if stage_of[n] == stage) for stage in counts}
    return figures.graph(merged, all_good, "What was made from what, by stage")
