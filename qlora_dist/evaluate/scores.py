"""Stage `scores`: one model, base or adapted, measured on the packed held-out rows of every domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.config.stages import ScoresConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import DataError
from qlora_dist.evaluate.answers import GENERAL, answer_questions, answer_rows, count_failures, write_answers
from qlora_dist.evaluate.calibration import Calibration
from qlora_dist.evaluate.documents import Document, score_rows, write_documents
from qlora_dist.evaluate.likelihood import measure_rows
from qlora_dist.evaluate.loading import open_scored_model
from qlora_dist.runtime import Facts, Progress, device, log_metrics, set_seed, write_json

SCORES_FILE = "scores.json"
ROWS_PREFIX = "rows-"


def score_model(config: ScoresConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes `scores.json` (a row for each domain and measure), and beside it the sums of each document and answer.

    Inputs are `base`; one `rows-<domain>` for each held-out set; `adapter`: none for the base itself, a PEFT folder,
    or a whole fine-tuned model when `config.full`; and, when answers or tasks are wanted, `tokenizer` and one
    `splits-<domain>` for each domain. Files of an earlier life are written over.

    Raises:
        DataError: if a held-out set holds no target.
        ModelError: if the adapter belongs to another base.
    """
    set_seed(0)
    with open_scored_model(config, inputs) as model:
        documents, table = _measure_sets(model, config, inputs)
        answers = answer_questions(model, config, inputs)
        harness = _run_harness(model, config, inputs)
    write_documents(documents, out)
    write_answers(answers, out)
    table += answer_rows(config.name, answers) + harness
    write_json(out / SCORES_FILE, {"rows": table})
    log_metrics(0, {f"{row['domain']}/{row['metric']}": row["value"] for row in table})
    return {
        "scores": table,
        "num_documents": len(documents),
        "num_targets": sum(d.tokens for d in documents),
        "num_answers": len(answers),
        "wrong_form": count_failures(answers),
    }


def _measure_sets(
    model: Any, config: ScoresConfig, inputs: Mapping[str, Path]
) -> tuple[list[Document], list[dict[str, Any]]]:
    sets = {n.removeprefix(ROWS_PREFIX): Rows.open(p) for n, p in sorted(inputs.items()) if n.startswith(ROWS_PREFIX)}
    progress = Progress(total=sum(_num_rows(config, rows) for rows in sets.values()), unit="row")
    documents: list[Document] = []
    calibrated = []
    for domain, rows in sets.items():
        found, calibration = measure(model, rows, domain, config, progress)
        documents += found
        row = {"model": config.name, "domain": domain, "split": config.evaluate.split, "metric": "calibration_error"}
        calibrated.append({**row, "value": calibration.error(), "low": None, "high": None,
                           "num_documents": len(found)})  # fmt: skip
    return documents, score_rows(config.name, documents) + calibrated


def _run_harness(model: Any, config: ScoresConfig, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    told = config.evaluate
    if not told.lm_eval_tasks:
        return []
    from qlora_dist.evaluate.harness import run_tasks

    rows = run_tasks(model, inputs["tokenizer"], told.lm_eval_tasks, told.lm_eval_folder)
    return [{"model": config.name, **row} for row in rows]


def measure(
    model: Any, rows: Rows, domain: str, config: ScoresConfig, progress: Progress
) -> tuple[list[Document], Calibration]:
    """Returns the sums of each document of one held-out set, and the calibration over all its targets.

    Raises:
        DataError: if no slot of these rows is a target, or a sum isn't finite.
    """
    split, num_rows, before = config.evaluate.split, _num_rows(config, rows), progress.done
    sums: dict[int, Document] = {}
    calibration = Calibration()
    found = measure_rows(
        model, rows, num_rows, config.evaluate.batch_tokens, device(), with_kl=domain == GENERAL and not config.full
    )
    for index_B, batch, slots in found:
        carries_BT = batch.trained_BT & ~np.isin(batch.tokens_BT, rows.silent_ids)
        calibration.add(slots, batch.trained_BT)
        for b, row in enumerate(index_B):
            for segment in rows.segments_of(int(row)):
                at = (b, slice(int(segment["start"]), int(segment["start"]) + int(segment["length"])))
                number = int(segment["record"])
                if number not in sums:
                    record = rows.records[number]
                    cluster = str(record["cluster"] or record["id"])
                    sums[number] = Document(domain=domain, split=split, record=str(record["id"]), cluster=cluster)
                sums[number].add(slots, at, batch.trained_BT[at], carries_BT[at], int(segment["trained_bytes"]))
        progress.update(before + int(index_B[-1]) + 1)
    return _checked([sums[i] for i in sorted(sums)], domain, split), calibration


def _num_rows(config: ScoresConfig, rows: Rows) -> int:
    return min(rows.num_rows, config.evaluate.max_rows or rows.num_rows)


def _checked(documents: list[Document], domain: str, split: str) -> list[Document]:
    if not any(d.tokens for d in documents):
        raise DataError(
            f"domain.{domain}: split {split!r} holds nothing to score. Raise domain.{domain}.split.{split}_share."
        )
    for document in documents:
        if not np.isfinite(document.nll):
            raise DataError(
                f"domain.{domain}: document {document.record} has a loss of {document.nll}: the model is broken."
            )
    return documents
