"""The sections of a report, made from a run: what is there is shown, what isn't is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_dist.evaluate import figures
from qlora_dist.evaluate.examples import mark
from qlora_dist.evaluate.page import Section, Table, is_scalar, union_table
from qlora_dist.evaluate.summary import NodeView, Row, RunView, mapping, mappings, number, text

METRIC_NAMES = {
    "bits_per_byte": "bits per byte (lower is better)",
    "completion_loss": "loss per token, nats (lower is better)",
    "token_kl": "KL from the base per token, nats (lower forgets less)",
    "term_loss": "loss of a domain's term, nats (lower is better)",
    "next_token_accuracy": "share of targets that were the likeliest token (higher is better)",
    "calibration_error": "expected calibration error (lower is better)",
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
TRAINED_STAGES = ("tiny", "adapter")
DATA_STAGES = ("records", "splits", "shards", "tokenizer", "rows")


def report_sections(run: RunView) -> list[Section]:
    """Returns every section that the run has something to say about, in reading order."""
    made = (
        outcome(run),
        scores(run),
        matrix(run),
        examples(run),
        curves(run),
        cost(run),
        merge(run),
        certificate(run),
        data(run),
        work(run),
        settings(run),
    )
    return [section for section in made if section is not None]


def outcome(run: RunView) -> Section:
    """Says first how the run ended, what is shipped, how to use it, and what moved against the base."""
    failed = [[f"{n.stage}/{n.label}", n.error, n.log] for n in run.nodes if n.state == "failed"]
    reasons = mappings(run.verdict.get("reasons"))
    columns = ["check", "passed", "wanted", "found"]
    tables = [
        Table("Verdict", columns, [[r.get(c) for c in columns] for r in reasons]),
        Table("What failed", ["node", "why", "log"], failed),
        Table("Notes", ["note"], [[note] for note in run.notes]),
    ]
    ended = "Every node finished." if run.state == "done" else f"{len(failed)} of {len(run.nodes)} nodes failed."
    shipped = f"The adapter is in {run.adapter}." if run.adapter else "No adapter was shipped."
    text = " ".join(part for part in (_verdict(run), ended, shipped) if part)
    return Section("Outcome", text, [t for t in tables if t.rows], code=run.use)


def _verdict(run: RunView) -> str:
    if not run.verdict:
        return ""
    failed = [str(r.get("check")) for r in mappings(run.verdict.get("reasons")) if not r.get("passed")]
    return "Verdict: ship." if run.verdict.get("ship") else f"Verdict: do not ship ({'; '.join(failed)})."


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
    section.figures.append(("matrix", figures.heat_map(grid, domains, models, title, middle=0)))
    columns = ["model", "domain", "difference", "low", "high", "p_holm", "minimal_detectable", "num_documents"]
    for metric in dict.fromkeys(r["metric"] for r in run.comparisons):
        chosen = [[r.get(c) for c in columns] for r in run.comparisons if r["metric"] == metric]
        section.tables.append(Table(f"Difference in {METRIC_NAMES.get(metric, metric)}", columns, chosen))
    return section


def scores(run: RunView) -> Section | None:
    """Shows every score with its interval, and a bar chart for each measure."""
    columns = ["model", "domain", "split", "value", "low", "high", "num_documents"]
    section = Section("Scores", "Intervals are 95 %, by bootstrap over clusters of near-copies.")
    for metric in dict.fromkeys(r["metric"] for r in run.scores):
        chosen = [r for r in run.scores if r["metric"] == metric]
        name = METRIC_NAMES.get(metric, metric.replace("_", " "))
        section.figures.append((f"scores-{metric}", figures.score_bars(chosen, metric, name)))
        section.tables.append(Table(name, columns, [[r.get(c) for c in columns] for r in chosen]))
    return section if section.tables else None


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


def cost(run: RunView) -> Section | None:
    """Shows what the run took: seconds, trained tokens and peak memory by stage."""
    rows = []
    for stage in dict.fromkeys(n.stage for n in run.nodes):
        nodes = [n for n in run.nodes if n.stage == stage]
        tokens = [t for n in nodes if (t := number(n.facts.get("tokens"))) is not None and stage in TRAINED_STAGES]
        peaks = [p for n in nodes if (p := number(n.facts.get("peak_memory_bytes"))) is not None]
        seconds = sum(n.seconds or 0 for n in nodes)
        rows.append([stage, len(nodes), seconds, int(sum(tokens)) or None, max(peaks) / 2**30 if peaks else None])
    columns = ["stage", "nodes", "seconds", "trained tokens", "peak memory, GiB"]
    return Section("Cost", tables=[Table("", columns, rows)], folded=True) if rows else None


def curves(run: RunView) -> Section | None:
    """Shows loss, learning rate and speed of every training over its steps."""
    section = Section("Training")
    metrics = dict.fromkeys(k for rows in run.curves.values() for r in rows for k in r if k != "step")
    for metric in sorted(metrics, key=lambda k: ("loss" not in k, k)):
        drawn = {label: _points(rows, metric) for label, rows in run.curves.items()}
        drawn = {label: points for label, points in drawn.items() if points[0]}
        if drawn:
            name = metric.replace("_", " ")
            section.figures.append((f"curve-{metric}", figures.lines(drawn, name, "step", name)))
            ends = [[label, len(xs), ys[0], min(ys), ys[-1]] for label, (xs, ys) in drawn.items()]
            section.tables.append(Table(name, ["training", "points", "first", "least", "last"], ends))
    return section if section.figures else None


def _points(rows: list[Row], metric: str) -> tuple[list[float], list[float]]:
    kept = [(r["step"], y) for r in rows if (y := number(r.get(metric))) is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def merge(run: RunView) -> Section | None:
    """Shows what each merge is made of, and how its parts lie to each other."""
    section = Section("Merge")
    for node in run.nodes_of("merged"):
        parts = mappings(node.facts.get("parts"))
        names = [str(p.get("label", i)) for i, p in enumerate(parts)]
        values = [{k: v for k, v in p.items() if k != "label"} for p in parts]
        section.tables += union_table(f"{node.label}: parts", "part", list(zip(names, values, strict=True)))
        _add_cosines(section, node, names)
        section.tables += union_table(f"{node.label}: the whole", "merge", [(node.label, node.facts)])
    return section if section.tables else None


def _add_cosines(section: Section, node: NodeView, names: list[str]) -> None:
    matrix = node.facts.get("cosines")
    if not isinstance(matrix, list) or len(names) < 2:
        return
    rows = [[number(x) for x in row] for row in matrix if isinstance(row, list)]
    if [len(row) for row in rows] == [len(names)] * len(names):
        title = f"{node.label}: cosine between the parts' updates"
        section.figures.append((f"cosines-{node.label}", figures.heat_map(rows, names, names, title, middle=0)))
        section.tables.append(Table(title, ["part", *names], [[n, *r] for n, r in zip(names, rows, strict=True)]))


def certificate(run: RunView) -> Section | None:
    """Shows the checks that each training passed before and after its first step."""
    tables = []
    for node in run.nodes_of("adapter"):
        checks = node.facts.get("certificate")
        if isinstance(checks, Mapping):
            checks = [{"check": k, **(v if isinstance(v, Mapping) else {"value": v})} for k, v in checks.items()]
        rows = mappings(checks)
        columns = list(dict.fromkeys(k for c in rows for k in c))
        tables.append(Table(node.label, columns, [[c.get(k) for k in columns] for c in rows]))
    tables = [t for t in tables if t.rows]
    return Section("Certificate", "What was proven of each training, not assumed.", tables) if tables else None


def data(run: RunView) -> Section | None:
    """Shows what the data stages counted: records, rejects, splits, rows, fill."""
    tables = [t for stage in DATA_STAGES for t in _facts_table(run, stage)]
    return Section("Data", tables=tables) if tables else None


def work(run: RunView) -> Section | None:
    """Shows every node with its key, state and time, and what the trainings reported of themselves."""
    nodes = [[n.stage, n.label, n.key, n.state, n.seconds] for n in run.nodes]
    tables = [Table("Nodes", ["stage", "label", "key", "state", "seconds"], nodes)] if nodes else []
    tables += [t for stage in ("tiny", "base", "adapter") for t in _facts_table(run, stage)]
    return Section("What was run", tables=tables, folded=True) if tables else None


def settings(run: RunView) -> Section | None:
    """Shows the command, the whole config, and the circumstances: commit, versions, hardware."""
    tables = [
        Table("Config", ["key", "value"], [list(pair) for pair in _flat(run.config)]),
        Table("Circumstances", ["what", "value"], [list(pair) for pair in _flat(run.circumstances)]),
    ]
    section = Section("Command and config", tables=[t for t in tables if t.rows], code=run.command, folded=True)
    return section if section.tables or section.code else None


def _facts_table(run: RunView, stage: str) -> list[Table]:
    return union_table(stage, "label", [(n.label, n.facts) for n in run.nodes_of(stage)])


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and not all(is_scalar(v) for v in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{i}]")
    elif value is not None and value != "":
        yield key, value
