"""Stage `scores`: models, the base or adapted ones, measured on the packed held-out rows of every domain.

Several models share one loaded base and one life: each is measured in turn, all of them answer questions in shared
batches, and what is found of each stands in its own folder as soon as it is known, so that a killed life is gone on
from. One that can't be loaded or measured takes no other along.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qlora_dist.config.fields import everything
from qlora_dist.config.stages import ScoresConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import ModelError, Preempted, QloraDistError
from qlora_dist.evaluate.answers import answer_questions, answer_rows, count_failures, read_answers
from qlora_dist.evaluate.calibration import calibration_rows, read_calibration, write_calibration
from qlora_dist.evaluate.documents import DOCUMENTS_FILE, read_documents, score_rows, write_documents
from qlora_dist.evaluate.held_out import HeldOut
from qlora_dist.evaluate.loading import Models, open_models
from qlora_dist.evaluate.terms import TermMarker, terms_of
from qlora_dist.runtime import Facts, Progress, clear, log, log_metrics, log_table, set_seed, write_json

SCORES_FILE = "scores.json"
SCORE_COLUMNS = ("model", "domain", "split", "metric", "value", "low", "high", "num_documents")
ANSWER_COLUMNS = ("domain", "record", "prompt", "reference", "answer", "failure")
ROWS_PREFIX = "rows-"
TOLD_FILE = ".told"

Made = TypeVar("Made")
Inputs = Mapping[str, Path]


def score_model(config: ScoresConfig, inputs: Inputs, out: Path) -> Facts:
    """Writes `scores.json` (a row for each domain and measure), and beside it the sums of each document and answer.

    Inputs are `base`; one `rows-<domain>` for each held-out set; `adapter`: none for the base itself, a PEFT folder,
    or a whole fine-tuned model when `config.full`; and, when answers or tasks are wanted, `tokenizer` and one
    `splits-<domain>` for each domain. What an earlier life of this node found is kept.

    Raises:
        DataError: if a held-out set holds no target.
        ModelError: if the adapter belongs to another base.
    """
    (found,) = _score({config.name: config}, {config.name: inputs}, {config.name: out}, is_lane=False).values()
    if isinstance(found, QloraDistError):
        raise found
    return found


def score_models(
    configs: Mapping[str, ScoresConfig], inputs: Mapping[str, Inputs], outs: Mapping[str, Path]
) -> dict[str, Facts | QloraDistError]:
    """Does what `score_model` does for several models at once, on one loaded base; answers by label."""
    made: dict[str, Facts | QloraDistError] = {}
    for labels in _alike(configs, inputs):
        group = ({n: configs[n] for n in labels}, {n: inputs[n] for n in labels}, {n: outs[n] for n in labels})
        made |= _score(*group, is_lane=True)
    return made


def _alike(configs: Mapping[str, ScoresConfig], inputs: Mapping[str, Inputs]) -> list[list[str]]:
    """Groups the models that differ in nothing but their adapter; a fully fine-tuned one stays alone."""
    groups: dict[str, list[str]] = {}
    for label, config in configs.items():
        told = {name: value for name, value in everything(config).items() if name != "name"}
        read = {name: path for name, path in inputs[label].items() if name != "adapter"}
        alone = label if config.full else ""
        groups.setdefault(f"{told} {sorted(read.items())} {alone}", []).append(label)
    return list(groups.values())


def _score(
    configs: Mapping[str, ScoresConfig], inputs: Mapping[str, Inputs], outs: Mapping[str, Path], *, is_lane: bool
) -> dict[str, Facts | QloraDistError]:
    set_seed(0)
    for label, config in configs.items():
        _go_on(outs[label], f"{everything(config)} {sorted(inputs[label].items())}")
    with open_models(configs, inputs) as models:
        made: dict[str, Facts | QloraDistError] = dict(models.failed)
        progress = Progress(total=_count_rows(configs, inputs, models), unit="row")
        for label in models.adapter_names:
            ended = _attempt(lambda n=label: _measure_sets(models, n, configs[n], inputs[n], outs[n], progress))
            if isinstance(ended, QloraDistError):
                made[label] = ended
        left = [label for label in models.adapter_names if label not in made]
        answer_questions(models, {n: configs[n] for n in left}, {n: inputs[n] for n in left}, outs)
        for label in left:
            lane = label if is_lane else ""
            made[label] = _attempt(lambda n=label, k=lane: _finish(models, n, configs[n], inputs[n], outs[n], k))
    return {label: made[label] for label in configs}


def _go_on(out: Path, told: str) -> None:
    """Keeps what an earlier life left in the folder if it was told the very same, and clears it else."""
    mark = out / TOLD_FILE
    if not mark.exists() or mark.read_text(encoding="utf-8") != told:
        clear(out)
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


def _count_rows(configs: Mapping[str, ScoresConfig], inputs: Mapping[str, Inputs], models: Models) -> int:
    sets = (held_out for label in models.adapter_names for held_out in _sets(configs[label], inputs[label]))
    return sum(held_out.num_rows for held_out in sets)


def _sets(config: ScoresConfig, inputs: Inputs) -> Iterator[HeldOut]:
    for name in sorted(inputs):
        if name.startswith(ROWS_PREFIX):
            rows = Rows.open(inputs[name])
            yield HeldOut(name.removeprefix(ROWS_PREFIX), config.evaluate.split, rows, config.evaluate.max_rows)


def _measure_sets(
    models: Models, label: str, config: ScoresConfig, inputs: Inputs, out: Path, progress: Progress
) -> None:
    sets = list(_sets(config, inputs))
    if (out / DOCUMENTS_FILE).exists():
        log.info("%s was measured by an earlier life", label)
        progress.update(progress.done + sum(held_out.num_rows for held_out in sets))
        return
    documents = []
    with models.only(label):
        for held_out in sets:
            terms = terms_of(held_out.domain, config, inputs)
            held_out.terms = TermMarker(inputs["tokenizer"], terms) if terms else None
            with_kl = models.is_adapted(label)
            documents += held_out.measure(models.network, config.evaluate.batch_tokens, progress, with_kl=with_kl)
    write_calibration({held_out.domain: held_out.calibration for held_out in sets}, out)
    write_documents(documents, out)


def _finish(
    models: Models, label: str, config: ScoresConfig, inputs: Inputs, out: Path, lane: str
) -> Facts:
    """Writes the score table of one model, and says it to the trackers."""
    documents, answers, calibration = read_documents(out), read_answers(out), read_calibration(out)
    table = score_rows(config.name, documents) + calibration_rows(config.name, config.evaluate.split, calibration)
    table += answer_rows(config.name, answers) + _run_harness(models, label, config, inputs)
    write_json(out / SCORES_FILE, {"rows": table})
    log_table("scores", list(SCORE_COLUMNS), [[row[c] for c in SCORE_COLUMNS] for row in table], lane)
    log_table("answers", list(ANSWER_COLUMNS), [[getattr(a, c) for c in ANSWER_COLUMNS] for a in answers], lane)
    log_metrics(0, {f"{row['domain']}/{row['metric']}": row["value"] for row in table}, lane)
    return {
        "scores": table,
        "num_documents": len(documents),
        "num_targets": sum(d.tokens for d in documents),
        "num_answers": len(answers),
        "wrong_form": count_failures(answers),
        "calibration": {domain: found.bins() for domain, found in calibration.items()},
    }


def _run_harness(models: Models, label: str, config: ScoresConfig, inputs: Inputs) -> list[dict[str, Any]]:
    told = config.evaluate
    if not told.lm_eval_tasks:
        return []
    from qlora_dist.evaluate.harness import run_tasks

    with models.only(label):
        rows = run_tasks(models.network, inputs["tokenizer"], told.lm_eval_tasks, told.lm_eval_folder)
    return [{"model": config.name, **row} for row in rows]
