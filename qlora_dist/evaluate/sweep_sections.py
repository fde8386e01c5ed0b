"""The report's section on a sweep: who was chosen and why, each trial with its settings and what it came to, a map."""

from __future__ import annotations

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Section, Table, map_table, shown, union_table
from qlora_dist.evaluate.summary import Row, RunView, mappings, number, text

SETTINGS = ("lora_rank", "lora_alpha", "learning_rate")
METRIC = "validation_loss"
FOUND = (
    *("chosen", "validation_bits_per_byte", "interval"),
    *("over_best", "interval of that", "p (Holm)", "forgetting", "forgets little enough"),
    *("state", "tokens", "chosen_by"),
)
"""What was found of a trial, in the order in which it is shown, after its settings."""
RAW = ("low", "high", "over_best_low", "over_best_high", "p_holm", "forgets_too_much")
"""What stands in `FOUND` under another name, or two in one."""
TEXT = """Trials are compared on development data, paired by document; of those that can't be told from the best, the \
smallest is chosen, and it alone goes on to the sealed test."""


def sweep(run: RunView) -> Section | None:
    """Shows who was chosen and why, each trial beside the best, a table of all, a map of rank by alpha, what was spent.

    Trials are compared on development data; the chosen one alone goes on to the sealed test.
    """
    trials, shards = mappings(run.sweep.get("trials")), mappings(run.sweep.get("shards"))
    metric = text(run.sweep.get("metric")) or METRIC
    section = Section("Sweep", " ".join(part for part in (TEXT, _spent(run.sweep)) if part))
    whys = [[text(shard.get(key)) for key in ("label", "winner", "reason")] for shard in shards]
    section.tables += [Table("Chosen", ["shard", "trial", "why"], whys)] if whys else []
    if len(shards) != 1:
        title = "Trials" if not shards else f"Trials: means over {len(shards)} shards"
        section.tables += _trials_table(title, trials, metric)
    for shard in shards:
        title = "Trials" if len(shards) == 1 else f"Trials of {text(shard.get('label'))}"
        winner = shard.get("winner")
        rows = [{**row, "chosen": row.get("trial") == winner or None} for row in mappings(shard.get("trials"))]
        made = _trials_table(title, rows, metric)
        for table in made:
            table.folded = len(shards) > 1
        section.tables += made
    if not section.tables:
        return None
    drawn = f"{metric.replace('_', ' ')} by rank and alpha, the best over all else (lower is better)"
    if map_made := figures.trial_map(trials, metric, drawn, x="lora_rank", y="lora_alpha"):
        section.draw("sweep-rank-alpha", map_made, map_table(map_made))
    for shard in shards:
        _add_beside_best(section, shard)
        _add_rungs(section, shard)
    return section


def _trials_table(title: str, trials: list[Row], metric: str) -> list[Table]:
    """Returns the table of trials, the best first; of those that were stopped early, whoever came furthest."""

    def order(trial: Row) -> tuple[bool, float]:
        value = number(trial.get(metric))
        return value is None, -(number(trial.get("tokens")) or 0.0) if value is None else value

    named = [(_label(trial, number), _told(trial)) for number, trial in enumerate(trials)]
    places = sorted(range(len(trials)), key=lambda i: order(trials[i]))
    return union_table(title, "trial", [named[i] for i in places])


def _told(trial: Row) -> Row:
    """Returns a trial's settings and what was found of it, as a person reads them."""
    told: Row = {key: value for key, value in trial.items() if key not in ("label", "trial", *RAW)}
    if "low" in trial or "high" in trial:
        told["interval"] = _interval(trial.get("low"), trial.get("high"))
    if "over_best_low" in trial:
        told["interval of that"] = _interval(trial.get("over_best_low"), trial.get("over_best_high"))
    if "p_holm" in trial:
        told["p (Holm)"] = trial["p_holm"]
    if isinstance(forgets := trial.get("forgets_too_much"), bool):
        told["forgets little enough"] = not forgets
    settings = [key for key in told if key not in (*SETTINGS, *FOUND)]
    return {key: told[key] for key in (*SETTINGS, *settings, *FOUND) if key in told}


def _interval(low: object, high: object) -> str | None:
    return None if number(low) is None or number(high) is None else f"{shown(low)} to {shown(high)}"


def _add_beside_best(section: Section, shard: Row) -> None:
    """Adds how far each trial is behind the best, with the paired interval: what reaches 0 may be as good."""
    rows: list[tuple[str, float, float | None, float | None]] = []
    for row in mappings(shard.get("trials")):
        value, low, high = (number(row.get(key)) for key in ("over_best", "over_best_low", "over_best_high"))
        if value is not None:
            rows.append((text(row.get("trial")), value, low, high))
    rows.sort(key=lambda row: row[1])
    if len(rows) < 2:
        return
    label = text(shard.get("label"))
    title = f"{label}: bits per byte more than the best, 95 % interval (what crosses 0 may be as good)"
    drawn = figures.intervals(rows, title, "bits per byte more than the best", chosen=[text(shard.get("winner"))])
    table = Table(title, ["trial", "more", "low", "high"], [[*row] for row in rows])
    section.draw(f"sweep-behind-{label}", drawn, table)


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
    chosen = [text(shard.get("winner"))]
    drawn = figures.lines(lines, name, "trained tokens", "bits per byte", first=chosen, dots=True, log_x=True)
    section.draw(f"sweep-rungs-{label}", drawn, table)


def _spent(sweep: Row) -> str:
    tokens, full = number(sweep.get("tokens")), number(sweep.get("grid_tokens"))
    if tokens is None:
        return ""
    whole = f", {tokens / full:.0%} of the {shown(full)} that training all trials to the end takes" if full else ""
    return f"{shown(tokens)} tokens were trained{whole}."


def _label(trial: Row, number: int) -> str:
    return text(trial.get("label")) or text(trial.get("trial")) or str(number)
