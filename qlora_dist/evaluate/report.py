"""The report: one self-contained HTML page, the same as Markdown, and the score table of a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.evaluate.page import shown
from qlora_dist.evaluate.scored_sections import ON_TERMINAL, metric_name
from qlora_dist.evaluate.sections import report_sections
from qlora_dist.evaluate.summary import number, view

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATES = Path(__file__).parent / "templates"


def write_report(summary: Mapping[str, Any], folder: Path) -> None:
    """Writes `report.html`, which needs no network, and `report.md`, each aside and renamed."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=lambda name: "html" in (name or ""), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["cell"] = _markdown_cell
    run = view(summary)
    sections = report_sections(run)
    figures = {name: figure for section in sections for name, figure in section.figures}
    values = {"run": run, "sections": sections, "figures": figures}
    html = environment.get_template("report.html.j2").render(plotly=get_plotlyjs() if figures else "", **values)
    _write(folder / "report.html", html)
    _write(folder / "report.md", environment.get_template("report.md.j2").render(**values))


def score_table(summary: Mapping[str, Any]) -> Table:
    """Returns the scores for a terminal: a row a model below each measure, a column for each held-out set."""
    from rich.table import Table

    rows = [r for r in view(summary).scores if r["metric"] in ON_TERMINAL]
    domains = list(dict.fromkeys(r["domain"] for r in rows))
    value = {(r["model"], r["metric"], r["domain"]): r for r in rows}
    table = Table(title="Scores on held-out text", title_justify="left")
    table.add_column("model", no_wrap=True)
    for domain in domains:
        table.add_column(str(domain), justify="right")
    for metric in (m for m in ON_TERMINAL if any(r["metric"] == m for r in rows)):
        table.add_section()
        table.add_row(metric_name(metric), style="dim")
        for model in dict.fromkeys(str(r["model"]) for r in rows if r["metric"] == metric):
            table.add_row(model, *(_with_reach(value.get((model, metric, domain), {})) for domain in domains))
    return table


def difference_table(summary: Mapping[str, Any]) -> Table | None:
    """Returns the shipped model against the base for a terminal: differences, intervals, p-values, what is detectable.

    The minimal detectable difference is the one that 80 % of such samples would find; None if nothing was compared.
    """
    from rich.table import Table

    run = view(summary)
    model = run.verdict.get("model") or "merged"
    rows = [r for m in ON_TERMINAL for r in run.comparisons if r["metric"] == m and r["model"] == model]
    if not rows:
        return None
    table = Table(title=f"{model} minus base, paired by document", title_justify="left", box=None, pad_edge=False)
    table.add_column("on")
    table.add_column("measure", min_width=13)
    for name in ("difference (95 %)", "p (Holm)", "detectable", "docs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high, p = (number(row.get(key)) for key in ("low", "high", "p_holm"))
        interval = "too few" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
        found = [shown(number(row.get("minimal_detectable"))), shown(row.get("num_documents"))]
        measure = metric_name(row["metric"]).split(" (")[0]
        table.add_row(row["domain"], measure, f"{row['difference']:+.3f} ({interval})", _p_value(p), *found)
    return table


def _p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _with_reach(row: Mapping[str, Any]) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    if low is None or high is None:
        return shown(row.get("value"))
    return f"{row['value']:.3f} ±{(high - low) / 2:.3f}"


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
