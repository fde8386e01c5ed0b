"""Stage `scores`: one model, base or adapted, measured on the packed held-out rows of every domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dist.config.stages import ScoresConfig
from qlora_dist.data.rows import Rows
from qlora_dist.evaluate.answers import answer_questions, answer_rows, count_failures, write_answers
from qlora_dist.evaluate.documents import Document, score_rows, write_documents
from qlora_dist.evaluate.held_out import HeldOut
from qlora_dist.evaluate.loading import open_scored_model
from qlora_dist.evaluate.terms import TermMarker, terms_of
from qlora_dist.runtime import Facts, Progress, log_metrics, log_table, set_seed, write_json

SCORES_FILE = "scores.json"
SCORE_COLUMNS = ("model", "domain", "split", "metric", "value", "low", "high", "num_documents")
ANSWER_COLUMNS = ("domain", "record", "prompt", "reference", "answer", "failure")
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
    log_table("scores", list(SCORE_COLUMNS), [[row[c] for c in SCORE_COLUMNS] for row in table])
    log_table("answers", list(ANSWER_COLUMNS), [[getattr(a, c) for c in ANSWER_COLUMNS] for a in answers])
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
    told = config.evaluate
    sets = [_held_out(name, config, inputs) for name in sorted(inputs) if name.startswith(ROWS_PREFIX)]
    progress = Progress(total=sum(held_out.num_rows for held_out in sets), unit="row")
    documents: list[Document] = []
    calibrated = []
    for held_out in sets:
        found = held_out.measure(model, told.batch_tokens, progress, with_kl=not config.full)
        documents += found
        row: dict[str, Any] = {
            "model": config.name,
            "domain": held_out.domain,
            "split": told.split,
            "metric": "calibration_error",
        }
        row |= {"value": held_out.calibration.error(), "low": None, "high": None, "num_documents": len(found)}
        calibrated.append(row)
    return documents, score_rows(config.name, documents) + calibrated


def _held_out(name: str, config: ScoresConfig, inputs: Mapping[str, Path]) -> HeldOut:
    domain = name.removeprefix(ROWS_PREFIX)
    terms = terms_of(domain, inputs)
    marker = TermMarker(inputs["tokenizer"], terms) if terms else None
    return HeldOut(domain, config.evaluate.split, Rows.open(inputs[name]), config.evaluate.max_rows, marker)


def _run_harness(model: Any, config: ScoresConfig, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    told = config.evaluate
    if not told.lm_eval_tasks:
        return []
    from qlora_dist.evaluate.harness import run_tasks

    rows = run_tasks(model, inputs["tokenizer"], told.lm_eval_tasks, told.lm_eval_folder)
    return [{"model": config.name, **row} for row in rows]
