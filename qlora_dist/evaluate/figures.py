"""Figures as plain JSON for the plotly that is embedded in the report; nothing here imports plotly.

Colours are those of Okabe and Ito, told apart by colour-blind readers; backgrounds are transparent, so that the
page's light or dark theme shows through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_dist.evaluate.page import Figure
from qlora_dist.evaluate.summary import number

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a", "#b59f00")


def figure(data: list[dict[str, Any]], title: str, x: str, y: str, **layout: Any) -> Figure:
    """Returns a figure in the report's style, with both axes named."""
    return {
        "data": data,
        "layout": {
            "title": {"text": title},
            "xaxis": {"title": {"text": x}, "automargin": True},
            "yaxis": {"title": {"text": y}, "automargin": True},
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


def score_bars(rows: Sequence[Mapping[str, Any]], metric: str, label: str) -> Figure:
    """Returns grouped bars of one measure: domains along the axis, a colour for each model, intervals as whiskers."""
    domains = list(dict.fromkeys(r["domain"] for r in rows))
    models = list(dict.fromkeys(r["model"] for r in rows))
    value = {(r["model"], r["domain"]): r for r in rows}
    data = [_bar(model, domains, [value.get((model, d), {}) for d in domains]) for model in models]
    return figure(data, label, "held-out set", metric, barmode="group")


def _bar(model: str, domains: list[str], rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    def reach(row: Mapping[str, Any], end: str) -> float:
        limit = number(row.get(end))
        return abs(limit - row["value"]) if limit is not None else 0.0

    errors = {"array": [reach(r, "high") for r in rows], "arrayminus": [reach(r, "low") for r in rows]}
    return {
        "type": "bar",
        "name": model,
        "x": domains,
        "y": [r.get("value") for r in rows],
        "error_y": {"type": "data", "symmetric": False, "thickness": 1.2, **errors, "visible": any(errors["array"])},
    }


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x: str, y: str) -> Figure:
    """Returns one line for each named curve of (x values, y values)."""
    data = [
        {"type": "scatter", "mode": "lines" if len(xs) > 1 else "markers", "name": name, "x": list(xs), "y": list(ys)}
        for name, (xs, ys) in curves.items()
    ]
    return figure(data, title, x, y, hovermode="x unified")


def heat_map(
    values: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    *,
    middle: float | None = None,
) -> Figure:
    """Returns a heat map with its numbers written in; `middle` centres a two-sided colour scale there."""
    scale = {"colorscale": "RdBu", "zmid": middle} if middle is not None else {"colorscale": "Blues"}
    text = [["" if v is None else f"{v:.3g}" for v in row] for row in values]
    data = {
        "type": "heatmap",
        "z": [list(r) for r in values],
        "x": list(columns),
        "y": list(rows),
        "text": text,
        **scale,
    }
    data |= {"texttemplate": "%{text}", "hovertemplate": "%{y} on %{x}: %{z:.4g}<extra></extra>"}
    height = 120 + 34 * len(rows)
    layout = {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 32},
        "xaxis": {"type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed"},
    }
    return figure([data], title, "", "", **layout)
