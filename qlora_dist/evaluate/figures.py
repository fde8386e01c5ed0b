"""Figures as plain JSON for the plotly that is embedded in the report; nothing here imports plotly.

Colours are those of Okabe and Ito, told apart by colour-blind readers; backgrounds are transparent, so that the
page's light or dark theme shows through.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_dist.evaluate.page import Figure
from qlora_dist.evaluate.summary import number

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a", "#b59f00")

TWO_SIDED = [[0.0, "#0072b2"], [0.5, "#f2f2f2"], [1.0, "#d55e00"]]
"""Blue below the middle, orange above it."""

MAX_TOLD_AT_ONCE = 8
"""With more curves, the pointer tells the nearest one alone, and no legend lists them."""

ONE_SIDED = [[0.0, "#eaf2f8"], [1.0, "#08519c"]]

CROSS = "✗"
"""Stands in the cell of a trial that was refused."""

MARKS = {
    "forgets little enough": {"symbol": "circle", "color": COLORS[0]},
    "forgets too much": {"symbol": "x", "color": COLORS[6]},
    "chosen": {"symbol": "diamond", "color": COLORS[5]},
    "chosen, though it forgets too much": {"symbol": "diamond-x", "color": COLORS[5]},
}
"""How a trial is drawn, by what the legend says of it."""


def figure(data: list[dict[str, Any]], title: str, x: str, y: str, **layout: Any) -> Figure:
    """Returns a figure in the report's style, with both axes named."""
    return {
        "data": data,
        "layout": {
            "title": {"text": title},
            "xaxis": {"title": {"text": x}, "automargin": True},
            "yaxis": {"title": {"text": y, "standoff": 12}, "automargin": True},
            "colorway": list(COLORS),
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 60, "r": 16, "t": 16, "b": 56},
            "modebar": {"bgcolor": "rgba(0,0,0,0)"},
            "legend": {"orientation": "h", "y": -0.28},
            "height": 380,
            **layout,
        },
    }


def score_points(rows: Sequence[Mapping[str, Any]], metric: str, label: str) -> Figure:
    """Returns one measure as points with intervals: held-out sets along the axis, a colour for each model.

    Points, not bars: what differs between models is small beside the distance to zero. Shares span 0 to 1.
    """
    domains = list(dict.fromkeys(r["domain"] for r in rows))
    models = list(dict.fromkeys(r["model"] for r in rows))
    value = {(r["model"], r["domain"]): r for r in rows}
    data = [_points(model, domains, [value.get((model, d), {}) for d in domains]) for model in models]
    made = figure(data, label, "held-out set", metric, scattermode="group")
    made["layout"]["xaxis"] |= {"type": "category", "showgrid": False}
    if "higher is better" in label and all(0 <= r["value"] <= 1 for r in rows):
        made["layout"]["yaxis"] |= {"range": [-0.05, 1.05]}
    else:
        ends = [v for r in rows for key in ("low", "value", "high") if (v := number(r.get(key))) is not None]
        room = 0.08 * (max(ends) - min(ends)) or 1.0
        made["layout"]["yaxis"] |= {"range": [min(ends) - room, max(ends) + room]}
    return made


def _points(model: str, domains: list[str], rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    def reach(row: Mapping[str, Any], end: str) -> float:
        limit = number(row.get(end))
        return abs(limit - row["value"]) if limit is not None else 0.0

    errors = {"array": [reach(r, "high") for r in rows], "arrayminus": [reach(r, "low") for r in rows]}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": model,
        "x": domains,
        "y": [r.get("value") for r in rows],
        "marker": {"size": 9},
        "error_y": {"type": "data", "symmetric": False, "thickness": 1.4, **errors, "visible": any(errors["array"])},
    }


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x: str,
    y: str,
    *,
    steps: bool = False,
    log_x: bool = False,
    dots: bool = False,
    first: Collection[str] = (),
) -> Figure:
    """Returns one line for each named curve of (x values, y values).

    Args:
        curves: (x values, y values) by name.
        title: what is drawn.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        steps: draws a histogram's outline.
        log_x: lets the horizontal axis be logarithmic.
        dots: marks each point.
        first: names that matter most: they have colours and stand in the legend, all others are thin and grey.
    """
    chosen = [name for name in curves if name in first]
    order = [*(name for name in curves if name not in first), *chosen]  # what is drawn last lies on top
    data = [_line(name, curves[name], steps=steps, dots=dots) for name in order]
    for line in data if chosen else []:
        is_chosen = line["name"] in first
        color = COLORS[chosen.index(line["name"]) % len(COLORS)] if is_chosen else COLORS[6]
        line["line"] |= {"color": color, "width": 3 if is_chosen else 1}
        line |= {"showlegend": is_chosen, "opacity": 1.0 if is_chosen else 0.6}
    few = len(order) <= MAX_TOLD_AT_ONCE
    made = figure(data, title, x, y, hovermode="x unified" if few else "closest")
    made["layout"]["showlegend"] = len(order) > 1 and (few or bool(chosen))
    made["layout"]["hoverdistance"] = -1  # the nearest point is told, however far apart the points are
    if log_x:
        made["layout"]["xaxis"] |= {"type": "log", "dtick": "D2"}
    return made


def _line(name: str, curve: tuple[Sequence[float], Sequence[float]], *, steps: bool, dots: bool) -> dict[str, Any]:
    xs, ys = curve
    lines = "lines+markers" if dots else "lines"
    shown = {"mode": lines if len(xs) > 1 else "markers", "line": {"shape": "hv"} if steps else {}}
    told = {"hovertemplate": "%{fullData.name}: %{y:.4g}<extra></extra>"}
    return {"type": "scatter", "name": name, "x": list(xs), "y": list(ys), **shown, **told}


def intervals(
    rows: Sequence[tuple[str, float, float | None, float | None]], title: str, x: str, kinds: Mapping[str, str]
) -> Figure:
    """Returns a line of the page for each (name, value, low, high), with a rule at 0: what crosses it may be nothing.

    Args:
        rows: from the top down; an interval of None is not drawn.
        title: what is drawn.
        x: what the values are.
        kinds: what each name is, one of `MARKS`; the legend says it.
    """
    by_kind = {kind: [row for row in rows if kinds[row[0]] == kind] for kind in MARKS}
    data = [_interval_points(kind, own) for kind, own in by_kind.items() if own]
    made = figure(data, title, x, "", height=130 + 26 * len(rows), showlegend=True)
    made["layout"]["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    order = {"categoryorder": "array", "categoryarray": [name for name, *_ in rows]}
    made["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", **order}
    made["layout"]["legend"] |= {"y": 1.02, "yanchor": "bottom"}
    made["layout"]["margin"] |= {"t": 40}
    return made


def _interval_points(kind: str, rows: Sequence[tuple[str, float, float | None, float | None]]) -> dict[str, Any]:
    def reach(value: float, end: float | None) -> float:
        return 0.0 if end is None else abs(end - value)

    above, below = [reach(v, high) for _, v, _, high in rows], [reach(v, low) for _, v, low, _ in rows]
    errors = {"array": above, "arrayminus": below}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "x": [value for _, value, _, _ in rows],
        "y": [name for name, *_ in rows],
        "marker": {"size": 9, **MARKS[kind]},
        "error_x": {"type": "data", "symmetric": False, "thickness": 1.4, **errors, "color": COLORS[6]},
        "hovertemplate": f"%{{y}}, {kind}: %{{x:.4g}}<extra></extra>",
    }


def heat_map(
    values: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    *,
    middle: float | None = None,
    x: str = "",
    y: str = "",
    least_is_best: bool = False,
    framed: Collection[tuple[int, int]] = (),
    marks: Mapping[tuple[int, int], str] | None = None,
) -> Figure:
    """Returns a heat map with its numbers written in; a cell of None stays empty.

    Args:
        values: [rows][columns].
        columns: names along the axis `x`.
        rows: names along the axis `y`, drawn from the top down.
        title: what the numbers are.
        middle: centres a two-sided colour scale there (blue below, orange above).
        x: name of the horizontal axis.
        y: name of the vertical axis.
        least_is_best: lets small numbers be dark.
        framed: the cells that are framed, each as (row, column).
        marks: what stands below the number of a cell.
    """
    marks = marks or {}
    digits = _digits(values)

    def written(i: int, j: int, value: float | None) -> str:
        return "" if value is None else "<br>".join(filter(None, [f"{value:.{digits}f}", marks.get((i, j), "")]))

    scale = {"colorscale": ONE_SIDED, "reversescale": least_is_best}
    if middle is not None:
        scale = {"colorscale": TWO_SIDED, "zmid": middle}
    data = {
        "type": "heatmap",
        "z": [list(r) for r in values],
        "x": list(columns),
        "y": list(rows),
        "text": [[written(i, j, v) for j, v in enumerate(row)] for i, row in enumerate(values)],
        "texttemplate": "%{text}",
        "hovertemplate": (f"{x} %{{x}}, {y} " if x else "%{x}, ") + "%{y}: %{z:.4g}<extra></extra>",
        "hoverongaps": False,
        "showscale": False,  # each cell says its number
        "xgap": 2,
        "ygap": 2,
        **scale,
    }
    made = figure([data], title, x, y, height=120 + (48 if marks else 34) * len(rows))
    made["layout"]["xaxis"] |= {"type": "category", "showgrid": False}
    made["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    line = {"color": COLORS[5], "width": 3}
    frames = [{"x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5} for i, j in framed]
    if frames:
        made["layout"]["shapes"] = [{"type": "rect", **frame, "line": line} for frame in frames]
    return made


def _digits(values: Sequence[Sequence[float | None]]) -> int:
    """Returns so many digits after the point that numbers which differ can be told apart: three of their spread."""
    told = [v for row in values for v in row if v is not None]
    spread = (max(told) - min(told) or max(map(abs, told))) if told else 0.0
    return 2 if spread <= 0 else min(6, max(0, 2 - math.floor(math.log10(spread))))


def trial_map(trials: Sequence[Mapping[str, Any]], metric: str, title: str, *, x: str, y: str) -> Figure | None:
    """Returns a heat map of trials over two of their settings, the chosen ones framed; None unless both vary.

    Each cell is the first of the trials that share it (of several learning rates, say). What was refused has a cross,
    and what was stopped the rung that its value is of.

    Args:
        trials: the chosen ones first, then from the best to the worst: a mapping a trial, which holds the settings `x`
            and `y` and the value `metric`, and may hold `chosen`, `forgets_too_much` and `rung`.
        metric: the key of the value.
        title: what the value is.
        x: the key of the setting along the horizontal axis, as `lora_rank`.
        y: the key of the one along the vertical axis, as `lora_alpha`.
    """
    cells: dict[tuple[float, float], Mapping[str, Any]] = {}
    for trial in trials:
        across, up, value = (number(trial.get(key)) for key in (x, y, metric))
        if across is not None and up is not None and value is not None:
            cells.setdefault((up, across), trial)
    rows, columns = (sorted({place[i] for place in cells}) for i in (0, 1))
    if len(columns) < 2 or len(rows) < 2:
        return None
    values = [[number(cells.get((row, column), {}).get(metric)) for column in columns] for row in rows]
    places = {(rows.index(up), columns.index(across)): trial for (up, across), trial in cells.items()}
    marks = {place: mark for place, trial in places.items() if (mark := _trial_mark(trial))}
    framed = [place for place, trial in places.items() if trial.get("chosen")] or [next(iter(places))]
    across_names, up_names = ([f"{v:g}" for v in axis] for axis in (columns, rows))
    x, y = x.replace("_", " "), y.replace("_", " ")
    return heat_map(values, across_names, up_names, title, x=x, y=y, least_is_best=True, framed=framed, marks=marks)


def _trial_mark(trial: Mapping[str, Any]) -> str:
    rung = number(trial.get("rung"))
    refused, stopped = CROSS if trial.get("forgets_too_much") is True else "", "" if rung is None else f"rung {rung:g}"
    return " ".join(filter(None, (refused, stopped)))


def graph(made_from: Mapping[str, Sequence[str]], good: Mapping[str, bool], title: str) -> Figure:
    """Returns a graph of things that were made from others: a line of the page each, further right the later it is.

    Names never cover each other, whatever the number of things and the width of the screen. A line that only
    shortens a longer way is left out.

    Args:
        made_from: the names of each thing's parents, by its own; parents that have no entry are left out.
        good: whether it was made.
        title: what is drawn.
    """
    depth: dict[str, int] = {}
    ancestors: dict[str, set[str]] = {}
    for name, parents in made_from.items():  # parents stand before their children
        depth[name] = 1 + max((depth[parent] for parent in parents if parent in depth), default=-1)
        ancestors[name] = set(parents).union(*(ancestors.get(parent, set()) for parent in parents))
    place = {name: i for i, name in enumerate(sorted(depth, key=lambda name: depth[name]))}
    xs: list[float | None] = []
    ys: list[float | None] = []
    for name, parents in made_from.items():
        further = set().union(*(ancestors.get(parent, set()) for parent in parents))
        for parent in dict.fromkeys(p for p in parents if p in place and p != name and p not in further):
            xs += [depth[parent], depth[name], None]
            ys += [place[parent], place[name], None]
    edges = {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "line": {"width": 1, "color": COLORS[6]}}
    names = list(place)
    color = [COLORS[0] if good.get(name) else COLORS[5] for name in names]
    symbol = ["circle" if good.get(name) else "x" for name in names]
    points = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [depth[name] for name in names],
        "y": [place[name] for name in names],
        "text": names,
        "textposition": "middle right",
        "marker": {"size": 9, "color": color, "symbol": symbol},
        "hovertext": [f"{name}<br>from {', '.join(made_from[name]) or 'the sources'}" for name in names],
        "hoverinfo": "text",
    }
    deepest = max(depth.values(), default=0)
    bare = {"visible": False, "showgrid": False, "zeroline": False}
    made = figure([edges | {"hoverinfo": "skip", "opacity": 0.5}, points], title, "", "", height=70 + 24 * len(names))
    made["layout"] |= {"showlegend": False, "margin": {"l": 8, "r": 8, "t": 8, "b": 8}}
    made["layout"]["xaxis"] |= bare | {"range": [-0.3, deepest * 1.5 + 1.5]}
    made["layout"]["yaxis"] |= bare | {"range": [len(names) - 0.3, -0.7]}
    return made
