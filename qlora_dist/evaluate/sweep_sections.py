"""The report's section on a sweep: who was chosen and why, each trial with its settings and what it came to, a map."""

from __future__ import annotations

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Section, Table, map_table, shown, union_table
from qlora_dist.evaluate.summary import Row, RunView, mapping, mappings, number, text

SETTINGS = ("lora_rank", "lora_alpha", "learning_rate")
METRIC = "validation_loss"
FOUND = (
    "validation_bits_per_byte",
    *("low", "high", "forgetting", "forgets_too_much"),
    *("over_best", "over_best_low", "over_best_high", "p_holm"),
    *("state", "tokens", "chosen_by"),
)
"""What was found of a trial, in the order in which it is shown, after its settings."""


def sweep(run: RunView) -> Section | None:
    """Shows who was chosen and why, a table of all trials, a heat map of rank by alpha, and what was spent.

    Trials are compared on development data; the chosen one alone goes on to the sealed test.
    """
    trials, shards = mappings(run.sweep.get("trials")), mappings(run.sweep.get("shards"))
    metric = text(run.sweep.get("metric")) or METRIC
    section = Section("Sweep", " ".join(part for part in (text(run.sweep.get("text")), _spent(run.sweep)) if part))
    title = "Trials" if len(shards) < 2 else f"Trials: means over {len(shards)} shards"
    section.tables += union_table(title, "trial", [(_label(trial, i), _rest(trial)) for i, trial in enumerate(trials)])
    if not section.tables:
        return None
    for shard in shards if len(shards) > 1 else []:
        rows = [(text(row.get("trial")), _rest(row)) for row in mappings(shard.get("trials"))]
        section.tables += union_table(f"Trials of {text(shard.get('label'))}", "trial", rows)
    drawn = f"{metric.replace('_', ' ')} by rank and alpha, the best over all else (lower is better)"
    if made := figures.trial_map(trials, metric, drawn, x="lora_rank", y="lora_alpha"):
        section.draw("sweep-rank-alpha", made, map_table(made))
    for shard in shards:
        _add_rungs(section, shard)
    return section


def _add_rungs(section: Section, shard: Row) -> None:
    """Adds how each trial of a halving came from rung to rung, until it was stopped."""
    rungs = mappings(shard.get("rungs"))
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for rung in rungs:
        x, y = number(rung.get("tokens")), number(rung.get("value"))
        if x is not None and y is not None:
            xs, ys = lines.setdefault(text(rung.get("trial")), ([], []))
            xs.append(x)
            ys.append(y)
    if not lines:
        return
    label = text(shard.get("label"))
    name = f"{label}: bits per byte of development data at each rung"
    columns = ["rung", "trial", "tokens", "value", "forgetting", "went on"]
    table = Table(name, columns, [[rung.get(c.replace(" ", "_")) for c in columns] for rung in rungs])
    section.draw(f"sweep-rungs-{label}", figures.lines(lines, name, "trained tokens", "bits per byte"), table)


def _spent(sweep: Row) -> str:
    tokens, full = number(sweep.get("tokens")), number(sweep.get("grid_tokens"))
    if tokens is None:
        return ""
    whole = f", {tokens / full:.0%} of the {shown(full)} that training all trials to the end takes" if full else ""
    return f"{shown(tokens)} tokens were trained{whole}."


def _label(trial: Row, number: int) -> str:
    return text(trial.get("label")) or str(number)


def _rest(trial: Row) -> Row:
    first = {key: trial[key] for key in SETTINGS if key in trial}
    rest = {key: value for key, value in trial.items() if key not in ("label", "trial", *FOUND)}
    return mapping(first | rest | {key: trial[key] for key in FOUND if key in trial})
