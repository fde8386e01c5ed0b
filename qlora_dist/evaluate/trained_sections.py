"""The report's sections on how the adapters were made: curves, merge, certificate."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Section, Table, map_table, union_table
from qlora_dist.evaluate.summary import NodeView, Row, RunView, mapping, mappings, number, text

PRETRAINING = "tiny"
MAX_CERTIFICATES = 3
"""With more trainings, their certificates are counted together, and each one is folded."""


def curves(run: RunView) -> Section | None:
    """Shows loss, learning rate and speed of every adapter's training over its steps."""
    pretrained = {node.label for node in run.nodes_of(PRETRAINING)}
    found = {label: rows for label, rows in run.curves.items() if label not in pretrained}
    chosen = _chosen(run) & found.keys()
    words = "In colour: the trials that were chosen. Point at a grey line to see whose it is." if chosen else ""
    return _drawn(Section("Training", words), found, chosen)


def pretraining(run: RunView) -> Section | None:
    """Shows how the embedded base was made, apart from the adapters, whose losses lie close together beside its own."""
    pretrained = {node.label for node in run.nodes_of(PRETRAINING)}
    found = {label: rows for label, rows in run.curves.items() if label in pretrained}
    return _drawn(Section("Pre-training of the base", folded=True), found, set(), "base-")


def _drawn(section: Section, found: Mapping[str, list[Row]], chosen: set[str], prefix: str = "") -> Section | None:
    metrics = dict.fromkeys(k for rows in found.values() for r in rows for k in r if k != "step")
    for metric in sorted(metrics, key=lambda k: ("loss" not in k, k)):
        drawn = {label: _points(rows, metric) for label, rows in found.items()}
        drawn = {label: points for label, points in drawn.items() if points[0]}
        if drawn:
            name = metric.replace("_", " ")
            ends = [[label, len(xs), ys[0], min(ys), ys[-1]] for label, (xs, ys) in drawn.items()]
            table = Table(name, ["training", "points", "first", "least", "last"], ends)
            section.draw(f"{prefix}curve-{metric}", figures.lines(drawn, name, "step", name, first=chosen), table)
    return section if section.figures else None


def _chosen(run: RunView) -> set[str]:
    """Returns the label of each shard's chosen trial."""
    return {f"{text(shard.get('label'))}.{text(shard.get('winner'))}" for shard in mappings(run.sweep.get("shards"))}


def _points(rows: list[Row], metric: str) -> tuple[list[float], list[float]]:
    kept = [(r["step"], y) for r in rows if (y := number(r.get(metric))) is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def merge(run: RunView) -> Section | None:
    """Shows what each merge is made of, and how its parts lie to each other."""
    section = Section(
        "Merge",
        "Interference stands as cross_energy: how much larger (+) the parts are together than apart, in squared norm, "
        "or how much they cancel (−).",
    )
    for node in run.nodes_of("merged", "chosen"):
        parts = mappings(node.facts.get("parts"))
        names = [str(p.get("label", i)) for i, p in enumerate(parts)]
        values = [{k: v for k, v in p.items() if k != "label"} for p in parts]
        section.tables += union_table(f"{node.label}: parts", "part", list(zip(names, values, strict=True)))
        _add_standings(section, node)
        _add_rounds(section, node, names)
        _add_cosines(section, node, names)
        _add_spectrum(section, node)
        section.tables += union_table(f"{node.label}: the whole", "merge", [(node.label, node.facts)])
    return section if section.tables else None


def _add_standings(section: Section, node: NodeView) -> None:
    """Adds the referee's candidates: gain on the domains and forgetting on development data, and who is shipped."""
    standings, chosen = mappings(node.facts.get("standings")), node.facts.get("chosen")
    if not standings:
        return
    domains = list(dict.fromkeys(d for s in standings for d in mapping(s.get("gain_by_domain"))))
    columns = ["candidate", "gain", *domains, "forgetting", "on the front", "shipped"]
    rows = []
    for s in standings:
        gains = [mapping(s.get("gain_by_domain")).get(d) for d in domains]
        is_chosen = s.get("candidate") == chosen
        rows.append([s.get("candidate"), s.get("gain"), *gains, s.get("forgetting"), s.get("on_front"), is_chosen])
    section.tables.append(Table("Candidates on development data, bits per byte", columns, rows))
    intervals = {name: mapping(node.facts.get(name)) for name in ("gain", "forgetting")}
    shown = [[name, v.get("value"), v.get("low"), v.get("high")] for name, v in intervals.items() if v]
    title = f"Shipped: {chosen} ({node.facts.get('reason')})"
    section.tables.append(Table(title, ["bits per byte", "value", "low", "high"], shown))


def _add_rounds(section: Section, node: NodeView, names: list[str]) -> None:
    """Adds who took part in each round, with which share, and how far the average moved."""
    rows = []
    for one in mappings(node.facts.get("rounds")):
        shares = mapping(one.get("weights"))
        rows.append([one.get("round"), one.get("moved"), *(shares.get(name, "absent") for name in names)])
    if rows:
        section.tables.append(Table(f"{node.label}: rounds", ["round", "moved", *names], rows))


def _add_cosines(section: Section, node: NodeView, names: list[str]) -> None:
    matrix = node.facts.get("cosines")
    if not isinstance(matrix, list) or len(names) < 2:
        return
    rows = [[number(x) for x in row] for row in matrix if isinstance(row, list)]
    if [len(row) for row in rows] == [len(names)] * len(names):
        title = f"{node.label}: cosine between the parts' updates"
        drawn = figures.heat_map(rows, names, names, title, middle=0)
        section.draw(f"cosines-{node.label}", drawn, map_table(drawn))


def _add_spectrum(section: Section, node: NodeView) -> None:
    """Adds how much of the merged update a cut to each rank would keep."""
    spectrum = node.facts.get("spectrum")
    shares = [share for x in (spectrum if isinstance(spectrum, list) else []) if (share := number(x)) is not None]
    if len(shares) < 2:
        return
    kept = [min(1.0, total) for total in accumulate(shares)]
    ranks = list(range(1, len(kept) + 1))
    title = f"{node.label}: energy kept by rank"
    drawn = {"share of the squared norm": (ranks, kept)}
    shown = [rank for rank in ranks if rank & (rank - 1) == 0 or rank == len(ranks)]
    table = Table(title, ["rank", "energy kept"], [[rank, kept[rank - 1]] for rank in shown])
    section.draw(f"spectrum-{node.label}", figures.lines(drawn, title, "rank", "energy kept"), table)


def certificate(run: RunView) -> Section | None:
    """Shows the checks that each training passed before and after its first step; of many, first how many passed."""
    found = {node.label: _checks(node) for node in run.nodes_of("adapter", "worker", "halved")}
    found = {label: rows for label, rows in found.items() if rows}
    many = len(found) > MAX_CERTIFICATES
    tables = [_together(found)] if many else []
    for label, rows in found.items():
        columns = list(dict.fromkeys(k for c in rows for k in c))
        tables.append(Table(label, columns, [[c.get(k) for k in columns] for c in rows], folded=many))
    return Section("Certificate", "What was proven of each training, not assumed.", tables) if tables else None


def _checks(node: NodeView) -> list[Row]:
    checks = node.facts.get("certificate")
    if isinstance(checks, Mapping):
        checks = [{"check": k, **(v if isinstance(v, Mapping) else {"value": v})} for k, v in checks.items()]
    return mappings(checks)


def _together(found: Mapping[str, list[Row]]) -> Table:
    """Counts the trainings that passed each check, and names those that did not."""
    by_check: dict[str, list[tuple[str, Row]]] = {}
    for label, rows in found.items():
        for row in rows:
            by_check.setdefault(text(row.get("check")), []).append((label, row))
    told: list[list[object]] = []
    for check, made in by_check.items():
        failed = [label for label, row in made if row.get("passed") is False]
        said = dict.fromkeys(text(row.get("found")) for _, row in made)
        other = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        by = f"{len(made) - len(failed)} of {len(made)}" + (f", not {', '.join(failed)}" if failed else "")
        told.append([check, f"{next(iter(said))}{other}", not failed, by])
    return Table(f"All {len(found)} trainings", ["check", "found", "passed", "by"], told)
