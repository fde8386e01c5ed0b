"""Stage `scores`: models, the base or adapted ones, measured on the packed held-out rows of every domain.

Several models share one loaded base and one life: each is measured in turn, all of them answer questions in shared
batches, and what is found of each stands in its own folder as soon as it is known, so that a killed life is gone on
from. One that can't be loaded or measured takes no other along.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qlora_dist.config.fields import everything
from qlora_dist.config.stages import ScoresConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import ModelError, Preempted, QloraDistError
from qlora_dist.evaluate.answers import answer_questions, answer_rows, count_failures, read_answers
from qlora_dist.evaluate.calibration import calibration_rows, read_calibration, write_calibration
from qlora_dist.evaluate.documents import DOCUMENTS_FILE, SCORES_FILE, read_documents, score_rows, write_documents
from qlora_dist.evaluate.harness import run_tasks, write_samples
from qlora_dist.evaluate.held_out import HeldOut
from qlora_dist.evaluate.loading import Inputs, Models, Task, open_models
from qlora_dist.evaluate.terms import TermMarker, terms_of
from qlora_dist.runtime import Facts, Progress, clear, log, log_image, log_metrics, log_table, set_seed, write_json
from qlora_dist.tracking.picture import square_picture

SCORE_COLUMNS = ("model", "domain", "split", "metric", "value", "low", "high", "num_documents")
ANSWER_COLUMNS = ("domain", "record", "prompt", "reference", "answer", "failure")
ROWS_PREFIX = "rows-"
TOLD_FILE = ".told"

Made = TypeVar("Made")


def score_model(config: ScoresConfig, inputs: Inputs, out: Path) -> Facts:
    """Writes `scores.json` (a row for each domain and measure), and beside it the sums of each document and answer.

    Inputs are `base`; one `rows-<domain>` for each held-out set; `adapter`: none for the base itself, a PEFT folder,
    or a whole fine-tuned model when `config.full`; and, when answers or tasks are wanted, `tokenizer` and one
    `splits-<domain>` for each domain. What an earlier life of this node found is kept.

    Raises:
        DataError: if a held-out set holds no target.
        ModelError: if the adapter belongs to another base.
    """
    (found,) = _score([Task(config.name, config, inputs, out)])
    if isinstance(found, QloraDistError):
        raise found
    return found


def score_models(
    configs: Mapping[str, ScoresConfig], inputs: Mapping[str, Inputs], outs: Mapping[str, Path]
) -> dict[str, Facts | QloraDistError]:
    """Does what `score_model` does for several models at once, on one loaded base; answers by label."""
    tasks = [Task(label, config, inputs[label], outs[label], lane=label) for label, config in configs.items()]
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.asked, []).append(task)
    return {task.label: found for alike in groups.values() for task, found in zip(alike, _score(alike), strict=True)}


def _score(tasks: Sequence[Task]) -> list[Facts | QloraDistError]:
    """Scores models that are asked the same; a result for each, in order."""
    set_seed(0)
    for task in tasks:
        _go_on(task)
    with open_models(tasks) as models:
        made: dict[str, Facts | QloraDistError] = dict(models.failed)
        here = [task for task in tasks if task.label not in made]
        progress = Progress(total=sum(held_out.num_rows for task in here for held_out in _sets(task)), unit="row")
        for task in here:
            ended = _attempt(partial(_measure_sets, models, task, progress))
            if isinstance(ended, QloraDistError):
                made[task.label] = ended
        here = [task for task in here if task.label not in made]
        answer_questions(models, here)
        made |= {task.label: _attempt(partial(_finish, models, task)) for task in here}
    return [made[task.label] for task in tasks]


def _go_on(task: Task) -> None:
    """Keeps what an earlier life left in the task's folder if it was told the very same, and clears it else."""
    told = f"{everything(task.config)} {sorted(task.inputs.items())}"
    mark = task.out / TOLD_FILE
    if not mark.exists() or mark.read_text(encoding="utf-8") != told:
        clear(task.out)
        mark.write_text(told, encoding="utf-8")


def _attempt(work: Callable[[], Made]) -> Made | QloraDistError:
    """Returns what the work of one model makes, or the error that ends it alone; a full disk or a stop ends all."""
    try:
        return work()
    except (Preempted, OSError):
        raise
    except QloraDistError as error:
        return error
    except Exception as error:
        traceback.print_exc()
        return ModelError(f"{type(error).__name__}: {error}. This is a fault of the program, not yours: see the log.")


def _sets(task: Task) -> Iterator[HeldOut]:
    told = task.config.evaluate
    for name in sorted(task.inputs):
        if name.startswith(ROWS_PREFIX):
            rows = Rows.open(task.inputs[name])
            yield HeldOut(name.removeprefix(ROWS_PREFIX), told.split, rows, told.max_rows)


def _measure_sets(models: Models, task: Task, progress: Progress) -> None:
    sets = list(_sets(task))
    if (task.out / DOCUMENTS_FILE).exists():
        log.info("%s was measured by an earlier life", task.label)
        progress.update(progress.done + sum(held_out.num_rows for held_out in sets))
        return
    documents, with_kl = [], models.is_adapted(task.label)
    with models.only(task.label):
        for held_out in sets:
            terms = terms_of(held_out.domain, task.config, task.inputs)
            held_out.terms = TermMarker(task.inputs["tokenizer"], terms) if terms else None
            documents += held_out.measure(models.network, task.config.evaluate.batch_tokens, progress, with_kl=with_kl)
    write_calibration({held_out.domain: held_out.calibration for held_out in sets}, task.out)
    write_documents(documents, task.out)


def _finish(models: Models, task: Task) -> Facts:
    """Writes the score table of one model, and says it to the trackers."""
    config, out, lane = task.config, task.out, task.lane
    documents, answers, calibration = read_documents(out), read_answers(out), read_calibration(out)
    table = score_rows(config.name, documents) + calibration_rows(config.name, config.evaluate.split, calibration)
    table += answer_rows(config.name, answers) + _run_harness(models, task)
    write_json(out / SCORES_FILE, {"rows": table})
    log_table("scores", list(SCORE_COLUMNS), [[row[c] for c in SCORE_COLUMNS] for row in table], lane)
    log_table("answers", list(ANSWER_COLUMNS), [[getattr(a, c) for c in ANSWER_COLUMNS] for a in answers], lane)
    for domain, found in calibration.items():
        bins = found.bins()
        points = list(zip(bins["confidence"], bins["accuracy"], strict=True))
        picture = square_picture({config.name: points}, f"{domain}: share right by confidence")
        log_image(f"calibration/{domain}", picture, lane)
    log_metrics(0, {f"{row['domain']}/{row['metric']}": row["value"] for row in table}, lane)
    return {
        "scores": table,
        "num_documents": len(documents),
        "num_targets": sum(d.tokens for d in documents),
        "num_answers": len(answers),
        "wrong_form": count_failures(answers),
        "calibration": {domain: found.bins() for domain, found in calibration.items()},
    }


def _run_harness(models: Models, task: Task) -> list[dict[str, Any]]:
    told = task.config.evaluate
    if not told.lm_eval_tasks:
        return []
    with models.only(task.label):
        rows, samples = run_tasks(models.network, task.inputs["tokenizer"], told.lm_eval_tasks, told.lm_eval_folder)
    write_samples(samples, task.out)
    return [{"model": task.config.name, **row} for row in rows]
