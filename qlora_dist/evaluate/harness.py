"""Everyone else's tasks, through lm-evaluation-harness, on the model that is already loaded."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.data.encode import Encoder
from qlora_dist.errors import ConfigError, nearest
from qlora_dist.evaluate.statistics import estimate_ratio

KEY = "evaluate.lm_eval_tasks"
SPLIT = "lm-eval"
SAMPLES_FILE = "tasks.jsonl"

BATCH_ROWS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """What one document of a task adds to a metric that is a ratio of sums; the document is named by its number."""

    task: str
    metric: str
    document: str
    top: float
    bottom: float


def run_tasks(
    model: Any, tokenizer: Path, tasks: Sequence[str], folder: str = ""
) -> tuple[list[dict[str, Any]], list[Sample]]:
    """Returns a row for each task and metric, as in a score table, and what each document adds to it.

    Where a metric is a ratio of sums over documents (accuracies, bits per byte), the interval is by bootstrap over
    documents, as for our own measures; else by the harness' own standard error (1.96 of it). bits_per_byte is ours to
    1e-4 where a document fits one row; longer ones are cut elsewhere (the harness begins a window with the last token
    of the one before).

    Args:
        model: a causal language model, with or without adapter.
        tokenizer: the folder of its tokenizer.
        tasks: names of tasks.
        folder: a folder of task YAML files beside those of the harness.

    Raises:
        ConfigError: if lm-eval isn't installed, or a task isn't known.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"{KEY}: {error}. Install it with: pip install 'qlora_dist[lm-eval]'.") from error
    from transformers import AutoTokenizer

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    own = str(Path(folder).expanduser()) if folder else None
    manager = TaskManager(include_path=own, include_defaults=False) if own else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=own)  # reads some ten thousand task files
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(f"{KEY}={task}: no such task. {nearest(task, manager.all_tasks)[:300]}")
    harness = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        batch_size=BATCH_ROWS,
        prefix_token_id=Encoder(tokenizer).start_id,
    )
    found = simple_evaluate(model=harness, tasks=list(tasks), task_manager=manager, bootstrap_iters=200)
    rows, samples = [], []
    for task in found["results"]:
        for row in _rows(task, found):
            mine = _samples(task, row["metric"], row["value"], found)
            samples += mine
            rows.append(row | _interval(mine))
    return rows, samples


def write_samples(samples: Sequence[Sample], folder: Path) -> None:
    """Writes one JSON line a document and metric, aside and renamed."""
    aside = folder / f".{SAMPLES_FILE}"
    aside.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples), encoding="utf-8")
    aside.replace(folder / SAMPLES_FILE)


def read_samples(folder: Path) -> list[Sample]:
    """Reads what `write_samples` wrote; [] where no task was run."""
    path = folder / SAMPLES_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Sample(**json.loads(line)) for line in lines]


def _samples(task: str, metric: str, value: float, found: dict[str, Any]) -> list[Sample]:
    """Returns each document's part of a metric; [] unless their ratio is the value that the harness reports."""
    name = metric.partition(" (")[0]
    filters = {sample.get("filter", "none") for sample in found["samples"].get(task, [])}
    wanted = metric.partition(" (")[2].rstrip(")") or (next(iter(filters)) if len(filters) == 1 else "none")
    made = []
    for sample in found["samples"].get(task, []):
        part = sample.get(name)
        if sample.get("filter", "none") != wanted or part is None:
            continue
        if isinstance(part, (tuple, list)) and len(part) == 2:  # log-likelihood in nats, and units
            top, bottom = -float(part[0]) / math.log(2), float(part[1])
        elif isinstance(part, (int, float)):
            top, bottom = float(part), 1.0
        else:
            return []
        made.append(Sample(task, metric, str(sample["doc_id"]), top, bottom))
    whole = sum(sample.bottom for sample in made)
    is_ratio = whole > 0 and math.isclose(sum(s.top for s in made) / whole, value, rel_tol=1e-6, abs_tol=1e-9)
    return made if is_ratio else []


def _interval(samples: Sequence[Sample]) -> dict[str, float | None]:
    if not samples:
        return {}
    tops, bottoms = (np.array([getattr(sample, end) for sample in samples]) for end in ("top", "bottom"))
    estimate = estimate_ratio(tops, bottoms, np.array([sample.document for sample in samples]))
    return {"low": estimate.low, "high": estimate.high}


def _rows(task: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    counts = found.get("n-samples", {}).get(task, {})
    for name, value in found["results"][task].items():
        metric, _, way = name.partition(",")
        if not way or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = found["results"][task].get(f"{metric}_stderr,{way}")
        reach = 1.96 * error if isinstance(error, (int, float)) else None
        metric = metric if way == "none" else f"{metric} ({way})"
        rows.append(
            {
                "domain": task,
                "split": SPLIT,
                "metric": metric,
                "value": float(value),
                "low": None if reach is None else value - reach,
                "high": None if reach is None else value + reach,
                "num_documents": counts.get("effective"),
            }
        )
    return rows
