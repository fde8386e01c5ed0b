"""The report's section on a sweep: who was chosen and why, each trial with its settings and what it came to, a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.page import Section, Table, map_table, shown, union_table
from qlora_dist.evaluate.summary import Row, RunView, mapping, mappings, number, text

SETTINGS = ("lora_rank", "lora_alpha", "learning_rate")
METRIC = "validation_loss"
JUDGED = "forgets little enough"
FOUND = (
    *("chosen", JUDGED, "validation_bits_per_byte", "measured", "interval"),
    *("over_best", "interval of that", "p (Holm)", "forgetting"),
    *("state", "tokens", "chosen_by"),
)
"""What was found of a trial, in the order in which it is shown, after its settings."""
RAW = ("low", "high", "over_best_low", "over_best_high", "p_holm", "forgets_too_much", "rung")
"""What stands in `FOUND` under another name, or two in one."""
END = math.inf
"""The rung of what was trained to its end."""
TEXT = """Trials are compared on development data, paired by document; of those that can't be told from the best, the \
smallest is chosen, and it alone goes on to the sealed test."""
RUNGS_TEXT = """Trials were compared at rungs first: the rungs chose who came to the end, and what was stopped at one \
was judged by what it was there, with less training."""


def sweep(run: RunView) -> Section | None:
    """Shows who was chosen and why, each trial beside the best, a table of all, a map of rank by alpha, what was spent.

    Trials are compared on development data; the chosen one alone goes on to the sealed test. Means are taken over the
    shards of one domain: bits per byte of two domains are not of one kind.
    """
    shards = mappings(run.sweep.get("shards"))
    metric = text(run.sweep.get("metric")) or METRIC
    rungs_text = RUNGS_TEXT if any(mappings(shard.get("rungs")) for shard in shards) else ""
    section = Section("Sweep", " ".join(filter(None, (TEXT, rungs_text, _spent(run.sweep)))))
    whys = [[text(shard.get(key)) for key in ("label", "winner", "reason")] for shard in shards]
    section.tables += [Table("Chosen", ["shard", "trial", "why"], whys)] if whys else []
    if not shards:
        trials = mappings(run.sweep.get("trials"))
        section.tables += _trials_table("Trials", trials, metric)
        _add_map(section, trials, metric, "")
    limit = number(mapping(run.config.get("sweep")).get("max_forgetting"))
    domains = list(dict.fromkeys(text(shard.get("domain")) for shard in shards))
    for domain in domains:
        own = [shard for shard in shards if text(shard.get("domain")) == domain]
        _add_domain(section, own, metric, limit, domain if len(domains) > 1 else "")
    for shard in shards:
        _add_beside_best(section, shard)
        _add_rungs(section, shard)
    return section if section.tables else None


def _add_domain(section: Section, shards: Sequence[Row], metric: str, limit: float | None, domain: str) -> None:
    """Adds the trials of the shards of one domain: their means, those of each shard, and the map of rank by alpha.

    Args:
        section: the report's section.
        shards: what the sweep came to on each.
        metric: the value by which trials are compared.
        limit: how much a trial may forget, for those that were stopped before that was judged.
        domain: the domain's name, where the sweep is of several.
    """
    measured = [_measured(shard, metric, limit) for shard in shards]
    means = _means(shards, measured, metric)
    if len(shards) > 1:
        caption = f"means over {len(shards)} shards" + (f" of {domain}" if domain else "")
        section.tables += _trials_table(f"Trials: {caption}", means, metric)
        _add_map(section, means, metric, domain, f", {caption}")
    for shard, found in zip(shards, measured, strict=True):
        winner = shard.get("winner")
        trials = [{**row, "chosen": row.get("trial") == winner or None} for row in mappings(shard.get("trials"))]
        rows = [row | _furthest([found.get(text(row.get("trial")), {})]) for row in trials]
        is_alone = len(shards) == 1 and not domain
        made = _trials_table("Trials" if is_alone else f"Trials of {text(shard.get('label'))}", rows, metric)
        for table in made:
            table.folded = len(shards) > 1
        section.tables += made
        if len(shards) == 1:
            _add_map(section, rows, metric, domain, f", {domain}" if domain else "")


def _measured(shard: Row, metric: str, limit: float | None) -> dict[str, dict[float, Row]]:
    """Returns what was measured of each trial of a shard, by the rung; of what came to its end at `END` as well."""
    found: dict[str, dict[float, Row]] = {}
    for row in mappings(shard.get("rungs")):
        rung, value, forgot = (number(row.get(key)) for key in ("rung", "value", "forgetting"))
        if rung is not None and value is not None:
            refused = None if forgot is None or limit is None else forgot > limit
            told = {metric: value, "forgetting": forgot, "forgets_too_much": refused}
            found.setdefault(text(row.get("trial")), {})[rung] = told
    for row in mappings(shard.get("trials")):
        if number(row.get(metric)) is not None:
            told = {key: row.get(key) for key in (metric, "forgetting", "forgets_too_much", "over_best")}
            found.setdefault(text(row.get("trial")), {})[END] = told
    return found


def _furthest(found: Sequence[Mapping[float, Row]]) -> Row:
    """Returns the means of one trial over shards at the last rung that it reached on all of them; {} for no rung."""
    reached = set.intersection(*({*rungs} for rungs in found))
    if not reached:
        return {}
    last = max(reached)
    rows = [rungs[last] for rungs in found]
    means: Row = {key: _mean([row.get(key) for row in rows]) for key in rows[0] if key != "forgets_too_much"}
    refused = [row["forgets_too_much"] for row in rows if isinstance(row.get("forgets_too_much"), bool)]
    if refused:
        means["forgets_too_much"] = any(refused)
    if any(refused) and not all(refused):
        means[JUDGED] = f"in {refused.count(False)} of {len(refused)} shards"
    if any(rung != END for rungs in found for rung in rungs):
        means["measured"] = "at the end" if last == END else f"at rung {last:g}"
    return means | ({} if last == END else {"rung": last})


def _means(shards: Sequence[Row], measured: Sequence[Mapping[str, Mapping[float, Row]]], metric: str) -> list[Row]:
    """Returns a row for each trial: its settings, its means over the shards, and by how many it was chosen."""
    columns = shards[0].get("columns")
    settings = [text(column) for column in columns] if isinstance(columns, list) else SETTINGS
    rows: dict[str, list[tuple[Row, Mapping[float, Row]]]] = {}
    for shard, found in zip(shards, measured, strict=True):
        for row in mappings(shard.get("trials")):
            name = text(row.get("trial"))
            rows.setdefault(name, []).append((row, found.get(name, {})))
    made = []
    for name, both in rows.items():
        told = {"trial": name, **{key: both[0][0][key] for key in settings if key in both[0][0]}, metric: None}
        told |= _furthest([found for _, found in both])
        told["tokens"] = sum(number(row.get("tokens")) or 0 for row, _ in both)
        made.append(told | {"chosen_by": sum(text(shard.get("winner")) == name for shard in shards)})
    return made


def _mean(values: Sequence[object]) -> float | None:
    known = [found for value in values if (found := number(value)) is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _ordered(trials: Sequence[Row], metric: str) -> list[Row]:
    """Returns trials best first: those at their end, then by the rung; allowed ones before those refused.

    Of those of which nothing was measured, whoever came furthest is first.
    """

    def order(trial: Row) -> tuple[float, bool, float]:
        value, rung = number(trial.get(metric)), number(trial.get("rung"))
        if value is None:
            return END, False, -(number(trial.get("tokens")) or 0.0)
        return -END if rung is None else -rung, trial.get("forgets_too_much") is True, value

    return sorted(trials, key=order)


def _trials_table(title: str, trials: Sequence[Row], metric: str) -> list[Table]:
    """Returns the table of trials, the best first."""
    labelled = [{**trial, "label": _label(trial, number)} for number, trial in enumerate(trials)]
    return union_table(title, "trial", [(trial["label"], _told(trial)) for trial in _ordered(labelled, metric)])


def _add_map(section: Section, trials: Sequence[Row], metric: str, domain: str, of: str = "") -> None:
    """Adds the map of rank by alpha: of each cell the chosen trial, else the best one."""
    ordered = [{**t, "chosen": bool(t.get("chosen") or t.get("chosen_by"))} for t in _ordered(trials, metric)]
    ordered.sort(key=lambda trial: not trial["chosen"])
    drawn = f"{metric.replace('_', ' ')} by rank and alpha{of} (lower is better): of each cell the best over all else"
    drawn += "; framed: chosen" if any(t["chosen"] for t in ordered) else ""
    made = figures.trial_map(ordered, metric, drawn, x="lora_rank", y="lora_alpha")
    if made is None:
        return
    (cells,) = made["data"]
    marked = "".join(told for row in cells["text"] for told in row)
    legend = [f"{figures.CROSS}: forgets too much"] * (figures.CROSS in marked)
    legend += ["rung: measured there, with less training"] * ("rung" in marked)
    made["layout"]["title"]["text"] = "; ".join([drawn, *legend])
    table = map_table(made)
    for row, values, told in zip(table.rows, cells["z"], cells["text"], strict=True):
        pairs = zip(values, told, strict=True)
        row[1:] = [words.replace("<br>", " ") if "<br>" in words else value for value, words in pairs]
    section.draw("-".join(filter(None, ("sweep-rank-alpha", domain))), made, table)


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
        told.setdefault(JUDGED, not forgets)
    settings = [key for key in told if key not in (*SETTINGS, *FOUND)]
    return {key: told[key] for key in (*SETTINGS, *settings, *FOUND) if key in told}


def _interval(low: object, high: object) -> str | None:
    return None if number(low) is None or number(high) is None else f"{shown(low)} to {shown(high)}"


def _add_beside_best(section: Section, shard: Row) -> None:
    """Adds how far each trial is behind the best, with the paired interval: what reaches 0 may be as good.

    One that forgets too much may be ahead of the best, and has a mark of its own.
    """
    rows: list[tuple[str, float, float | None, float | None]] = []
    kinds: dict[str, str] = {}
    for row in mappings(shard.get("trials")):
        value, low, high = (number(row.get(key)) for key in ("over_best", "over_best_low", "over_best_high"))
        if value is not None:
            name, refused = text(row.get("trial")), row.get("forgets_too_much") is True
            rows.append((name, value, low, high))
            kinds[name] = "forgets too much" if refused else JUDGED
            if name == text(shard.get("winner")):
                kinds[name] = "chosen, though it forgets too much" if refused else "chosen"
    rows.sort(key=lambda row: row[1])
    if len(rows) < 2:
        return
    label = text(shard.get("label"))
    title = f"{label}: bits per byte more than the best, 95 % interval (what crosses 0 may be as good)"
    drawn = figures.intervals(rows, title, "bits per byte more than the best", kinds)
    told = [[name, kinds[name], *values] for name, *values in rows]
    table = Table(title, ["trial", "it is", "more", "low", "high"], told)
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
