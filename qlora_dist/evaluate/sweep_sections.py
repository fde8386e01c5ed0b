"""The report's section on a sweep: every trial with its settings and its loss, and the best of them on a map."""

from __future__ import annotations

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Section, map_table, union_table
from qlora_dist.evaluate.summary import Row, RunView, mappings, text

SETTINGS = ("lora_rank", "lora_alpha", "learning_rate")
METRIC = "validation_loss"


def sweep(run: RunView) -> Section | None:
    """Shows the trials of `summary["sweep"]["trials"]`: a table of all, and a heat map of rank by alpha.

    Trials are compared on development data; the best one alone goes on to the sealed test.
    """
    trials = mappings(run.sweep.get("trials"))
    section = Section("Sweep", text(run.sweep.get("text")))
    section.tables += union_table(
        "Trials", "trial", [(_label(trial, i), _rest(trial)) for i, trial in enumerate(trials)]
    )
    if not section.tables:
        return None
    metric = text(run.sweep.get("metric")) or METRIC
    title = f"{metric.replace('_', ' ')} by rank and alpha (lower is better)"
    if drawn := figures.trial_map(trials, metric, title, x="lora_rank", y="lora_alpha"):
        section.draw("sweep-rank-alpha", drawn, map_table(drawn))
    return section


def _label(trial: Row, number: int) -> str:
    return text(trial.get("label")) or str(number)


def _rest(trial: Row) -> Row:
    first = {key: trial[key] for key in SETTINGS if key in trial}
    return first | {key: value for key, value in trial.items() if key != "label"}
