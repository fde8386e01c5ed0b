"""Everyone else's tasks, through lm-evaluation-harness, on the model that is already loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dist.data.encode import Encoder
from qlora_dist.errors import ConfigError, nearest

KEY = "evaluate.lm_eval_tasks"

BATCH_ROWS = 8


def run_tasks(model: Any, tokenizer: Path, tasks: Sequence[str], folder: str = "") -> list[dict[str, Any]]:
    """Returns a row for each task and metric: `{"domain": task, "metric", "value", "low", "high", "num_documents"}`.

    The harness' own standard error gives the interval (1.96 of it). bits_per_byte is ours to 1e-4 where a document
    fits one row; longer ones are cut elsewhere (the harness begins a window with the last token of the one before).

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
    manager = TaskManager(include_path=str(Path(folder).expanduser()) if folder else None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(f"{KEY}={task}: no such task. {nearest(task, manager.all_tasks)[:300]}")
    harness = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        batch_size=BATCH_ROWS,
        prefix_token_id=Encoder(tokenizer).start_id,
    )
    found = simple_evaluate(
        model=harness,
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=200,
        log_samples=False,
    )
    return [row for task in found["results"] for row in _rows(task, found)]


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
                "split": "lm-eval",
                "metric": metric,
                "value": float(value),
                "low": None if reach is None else value - reach,
                "high": None if reach is None else value + reach,
                "num_documents": counts.get("effective"),
            }
        )
    return rows
