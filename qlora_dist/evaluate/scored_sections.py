"""The report's sections on how good the models are: scores, differences from the base, examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.compare import BASE
from qlora_dist.evaluate.examples import mark
from qlora_dist.evaluate.page import Section, Table, map_table
from qlora_dist.evaluate.summary import Row, RunView, mapping, number, text

FIRST_METRICS = ("bits_per_byte", "completion_loss", "exact_match", "schema_valid")
"""Those that have a chart of their own."""

ON_TERMINAL = ("bits_per_byte", "exact_match", "schema_valid")

METRIC_NAMES = {
    "bits_per_byte": "bits per byte (lower is better)",
    "completion_loss": "loss per token, nats (lower is better)",
    "token_kl": "KL from the base per token, nats (lower forgets less)",
    "term_loss": "loss of a domain's term, nats (lower is better)",
    "next_token_accuracy": "share of targets that were the likeliest token (higher is better)",
    "calibration_error": "expected calibration error (lower is better)",
    "accuracy": "accuracy (higher is better)",
    "exact_match": "exact match (higher is better)",
    "token_f1": "F1 over words (higher is better)",
    "rouge_l": "ROUGE-L (higher is better)",
    "macro_f1": "macro-F1 over classes (higher is better)",
    "json_valid": "valid JSON (higher is better)",
    "schema_valid": "meets the references' schema (higher is better)",
    "term_recall": "recall of the domain's terms (higher is better)",
    "support": "share of words that the context holds (higher is better)",
    "repetition": "share of repeated 4-grams (lower is better)",
    "answer_tokens": "tokens of an answer",
    "ended": "share of answers that ended of themselves (higher is better)",
}
COMPARED = """Paired over the same documents; p-values are corrected for the number of models (Holm). \
The minimal detectable difference is the one that 80 % of such samples would find."""


def scores(run: RunView) -> Section | None:
    """Shows the scores that people compare first, each with its interval and a bar chart."""
    section = Section("Scores", "Intervals are 95 %, by bootstrap over clusters of near-copies.")
    for metric, chosen in _by_metric(run, of_first=True):
        drawn = figures.score_points(chosen, _plain(metric), metric_name(metric))
        section.draw(f"scores-{metric}", drawn, _score_table(metric, chosen))
        if metric != "bits_per_byte":
            section.tables += [replace(t, of=f"scores-{metric}") for t in _difference_tables(run, [metric])]
    return section if section.tables else None


def at_a_glance(run: RunView) -> Table:
    """Returns what a person asks first: the shipped model against the base, in the measures that are compared first."""
    model = text(run.verdict.get("model")) or "merged"
    value = {(r["model"], r["domain"], r["metric"]): r["value"] for r in run.scores}
    columns = ["measure", "domain", "base", model, "difference", "95 % interval"]
    rows = [
        [_with_arrow(metric), r["domain"], value.get((BASE, r["domain"], metric)),
         value.get((model, r["domain"], metric)), f"{r['difference']:+.3g}", _interval(r)]
        for metric in FIRST_METRICS for r in run.comparisons if r["metric"] == metric and r["model"] == model
    ]  # fmt: skip
    return Table(f"At a glance: {model} against the base", columns, rows)


def _interval(row: Row) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    return "too few documents" if low is None or high is None else f"{low:+.3g} to {high:+.3g}"


def _plain(metric: str) -> str:
    return metric_name(metric).partition(" (")[0]


def _with_arrow(metric: str) -> str:
    """Returns a measure's name with an arrow to where it is better."""
    arrows = {"higher": " ↑", "lower": " ↓"}
    return _plain(metric) + next((arrow for word, arrow in arrows.items() if f"{word} is" in metric_name(metric)), "")


def forms(run: RunView) -> Section | None:
    """Counts the answers of a wrong form by the kind of failure, for domains whose references are JSON."""
    found = {n.label: mapping(n.facts.get("wrong_form")) for n in run.nodes_of("scores")}
    rows = [
        [model, domain, kind, num] for model, by in found.items() for domain, kinds in by.items()
        for kind, num in mapping(kinds).items()
    ]  # fmt: skip
    answers = {n.label: n.facts.get("num_answers") for n in run.nodes_of("scores")}
    table = Table("Answers of a wrong form", ["model", "domain", "kind of failure", "answers"], rows)
    words = ", ".join(f"{model} {num}" for model, num in answers.items() if num)
    return Section("Form", f"Answers given: {words}.", [table]) if rows else None


def calibration(run: RunView) -> Section | None:
    """Shows how often a model is right about its likeliest token, by how sure it was."""
    section = Section("Calibration", "A model that knows how sure it is lies on the diagonal.", folded=True)
    found = {n.label: mapping(n.facts.get("calibration")) for n in run.nodes_of("scores")}
    for domain in dict.fromkeys(d for by in found.values() for d in by):
        curves = {}
        for model, by in found.items():
            bins = mapping(by.get(domain))
            points = list(zip(*(_numbers(bins.get(k)) for k in ("confidence", "accuracy", "count")), strict=False))
            if points:
                curves[model] = points
        if not curves:
            continue
        lines = {model: ([p[0] for p in points], [p[1] for p in points]) for model, points in curves.items()}
        title = f"{domain}: share of right tokens by confidence"
        drawn = figures.lines({"sure and right": ([0, 1], [0, 1]), **lines}, title, "confidence", "share right")
        rows = [[model, *point] for model, points in curves.items() for point in points]
        table = Table(title, ["model", "confidence", "share right", "tokens"], rows)
        section.draw(f"calibration-{domain}", drawn, table)
    return section if section.tables else None


def _numbers(values: Any) -> list[float]:
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None]


def further(run: RunView) -> Section | None:
    """Shows every other measure, and its differences from the base, as tables."""
    tables = [_score_table(metric, chosen) for metric, chosen in _by_metric(run, of_first=False)]
    others = dict.fromkeys(r["metric"] for r in run.comparisons if r["metric"] not in FIRST_METRICS)
    tables += _difference_tables(run, others)
    return Section("Further measures", tables=tables, folded=True) if tables else None


def metric_name(metric: str) -> str:
    """Returns a measure as a person calls it, with which way is better."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def _by_metric(run: RunView, *, of_first: bool) -> Iterator[tuple[str, list[Row]]]:
    for metric in dict.fromkeys(r["metric"] for r in run.scores):
        if (metric in FIRST_METRICS) is of_first:
            yield metric, [r for r in run.scores if r["metric"] == metric]


def _score_table(metric: str, rows: list[Row]) -> Table:
    keys = ["model", "domain", "split", "value", "low", "high", "num_documents"]
    return Table(metric_name(metric), [*keys[:-1], "documents"], [[r.get(c) for c in keys] for r in rows])


def _difference_tables(run: RunView, metrics: Iterable[str]) -> list[Table]:
    keys = ["model", "domain", "difference", "low", "high", "p_holm", "minimal_detectable", "num_documents"]
    columns = [*keys[:5], "p (Holm)", "minimal detectable", "documents"]
    tables = []
    for metric in metrics:
        rows = [[r.get(c) for c in keys] for r in run.comparisons if r["metric"] == metric]
        tables.append(Table(f"Difference in {metric_name(metric)}", columns, rows))
    return [table for table in tables if table.rows]


def matrix(run: RunView) -> Section | None:
    """Shows how every adapter and merge does on every domain: what transfers, what interferes, what is forgotten."""
    rows = [r for r in run.comparisons if r["metric"] == "bits_per_byte"]
    if not rows:
        return None
    models, domains = (list(dict.fromkeys(r[k] for r in rows)) for k in ("model", "domain"))
    value = {(r["model"], r["domain"]): r["difference"] for r in rows}
    grid = [[value.get((m, d)) for d in domains] for m in models]
    title = "Bits per byte minus the base's (negative is better)"
    section = Section("Against the base", COMPARED)
    drawn = figures.heat_map(grid, domains, models, title, middle=0, x="held-out set", y="model")
    section.draw("matrix", drawn, map_table(drawn))
    section.tables += _difference_tables(run, ["bits_per_byte"])
    return section


def examples(run: RunView) -> Section | None:
    """Shows the first questions of each domain with every model's answer, compared with the reference."""
    section = Section(
        "Examples", "Underlined words are not in the reference; struck ones stand only there.", folded=True
    )
    for example in run.examples:
        reference = text(example.get("reference"))
        said = [[model, mark(text(answer), reference)] for model, answer in mapping(example.get("answers")).items()]
        caption = f"{text(example.get('domain'))}: {text(example.get('prompt'))}"
        section.tables.append(Table(caption, ["model", "answer"], [["reference", reference], *said]))
    return section if section.tables else None
