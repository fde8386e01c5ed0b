"""Answers to held-out questions: generated, measured one by one, and kept, so that anything can be counted later."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.config.data import RenderConfig
from qlora_dist.data.encode import Encoder
from qlora_dist.data.record import Record, read_records
from qlora_dist.evaluate import measures
from qlora_dist.evaluate.generate import Generated, Prompter, generate
from qlora_dist.evaluate.loading import Models, Task
from qlora_dist.evaluate.schema import schema_failure, schema_of_references
from qlora_dist.evaluate.statistics import estimate_ratio
from qlora_dist.evaluate.terms import SPLITS_PREFIX, terms_of
from qlora_dist.runtime import log

ANSWERS_FILE = "answers.jsonl"


@dataclass(kw_only=True, slots=True)
class Answer:
    """One answer beside its reference, with the measures that apply to its kind."""

    domain: str
    split: str
    record: str
    cluster: str
    kind: str
    prompt: str
    reference: str
    answer: str
    failure: str = ""
    measures: dict[str, float] = field(default_factory=dict)


def answer_questions(models: Models, tasks: Sequence[Task]) -> None:
    """Writes each model's answers to the first `evaluate.max_answers` questions of each domain that has any.

    All models answer in the same batches, each row of a batch with its own adapter. They are `asked` the same. A model
    that answered in an earlier life is not asked again.
    """
    left = [task for task in tasks if not (task.out / ANSWERS_FILE).exists()]
    if not left:
        return
    names = [name for name in sorted(left[0].inputs) if name.startswith(SPLITS_PREFIX)]
    answers: dict[str, list[Answer]] = {task.label: [] for task in left}
    for name in names if left[0].config.evaluate.max_answers else []:
        for label, said in _answer_domain(models, left, name.removeprefix(SPLITS_PREFIX)).items():
            answers[label] += said
    if any(answers.values()) and measures.rouge_l("a", "a") is None:
        log.warning("rouge_l is left out: pip install 'qlora_dist[tasks]'")
    for task in left:
        write_answers(answers[task.label], task.out)


def _questions(path: Path, limit: int) -> list[Record]:
    asked = (r for r in read_records(path) if r.messages and r.messages[-1]["role"] == "assistant")
    return list(islice(asked, limit))


def _answer_domain(models: Models, tasks: Sequence[Task], domain: str) -> dict[str, list[Answer]]:
    config, inputs = tasks[0].config, tasks[0].inputs
    told = config.evaluate
    records = _questions(inputs[f"{SPLITS_PREFIX}{domain}"] / f"{told.split}.jsonl", told.max_answers)
    if not records:
        return {}
    prompter = Prompter(Encoder(inputs["tokenizer"], config.render.get(domain, RenderConfig())))
    prompts = [prompter.prompt_ids(r.messages[:-1]) for r in records] * len(tasks)
    names = [models.adapter_names[task.label] for task in tasks for _ in records]
    said = generate(models.network, prompter, prompts, told.max_new_tokens, told.batch_tokens, adapters=names)
    judge = _Judge(domain, told.split, terms_of(domain, config, inputs), _schema_of(records))
    return {task.label: [judge(record, next(said)) for record in records] for task in tasks}


def _schema_of(records: Sequence[Record]) -> dict[str, Any] | None:
    return schema_of_references([r.messages[-1]["content"] for r in records])


@dataclass(frozen=True, slots=True)
class _Judge:
    """Measures answers of one domain."""

    domain: str
    split: str
    terms: frozenset[str]
    schema: dict[str, Any] | None

    def __call__(self, record: Record, generated: Generated) -> Answer:
        answer = Answer(
            domain=self.domain,
            split=self.split,
            record=record.id,
            cluster=record.cluster or record.id,
            kind=record.kind,
            prompt=record.messages[-2]["content"],
            reference=record.messages[-1]["content"],
            answer=generated.text,
        )
        _measure(answer, generated, self.terms, self.schema)
        return answer


def _measure(answer: Answer, generated: Generated, terms: frozenset[str], schema: dict[str, Any] | None) -> None:
    text, reference = answer.answer, answer.reference
    found: dict[str, float | None] = {
        "exact_match": measures.exact_match(text, reference),
        "repetition": measures.repetition(text),
        "answer_tokens": float(generated.num_tokens),
        "ended": float(generated.ended),
    }
    if answer.kind == "classification":
        found["accuracy"] = found["exact_match"]
    else:
        found |= {"token_f1": measures.token_f1(text, reference), "rouge_l": measures.rouge_l(text, reference)}
        found["term_recall"] = measures.term_recall(text, reference, terms)
    if answer.kind == "rag":
        found["support"] = measures.support(text, answer.prompt)
    if schema is not None:
        value, answer.failure = measures.read_json(text)
        found["json_valid"] = float(not answer.failure)
        answer.failure = answer.failure or schema_failure(value, schema)
        found["schema_valid"] = float(not answer.failure)
    answer.measures = {name: value for name, value in found.items() if value is not None}


def answer_rows(model: str, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Returns a score row for each domain and measure: means with intervals, and macro-F1 over classes."""
    rows: list[dict[str, Any]] = []
    for domain in dict.fromkeys(a.domain for a in answers):
        chosen = [a for a in answers if a.domain == domain]
        head = {"model": model, "domain": domain, "split": chosen[0].split}
        for metric in dict.fromkeys(m for a in chosen for m in a.measures):
            measured = [a for a in chosen if metric in a.measures]
            tops = np.array([a.measures[metric] for a in measured])
            found = estimate_ratio(tops, np.ones(len(tops)), np.array([a.cluster for a in measured]))
            ends = {"low": found.low, "high": found.high, "num_documents": len(measured)}
            rows.append({**head, "metric": metric, "value": found.value, **ends})
        classes = [a for a in chosen if a.kind == "classification"]
        if classes:
            value = measures.macro_f1([a.answer for a in classes], [a.reference for a in classes])
            rows.append({**head, "metric": "macro_f1", "value": value, "low": None, "high": None,
                         "num_documents": len(classes)})  # fmt: skip
    return rows


def count_failures(answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    """Returns how often each kind of wrong form was found, by domain."""
    kinds: dict[str, Counter[str]] = {}
    for answer in answers:
        if answer.failure:
            kinds.setdefault(answer.domain, Counter())[answer.failure] += 1
    return {domain: dict(counter.most_common()) for domain, counter in kinds.items()}


def write_answers(answers: Sequence[Answer], folder: Path) -> None:
    """Writes one JSON line an answer, aside and renamed."""
    aside = folder / f".{ANSWERS_FILE}"
    aside.write_text("".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")
    aside.replace(folder / ANSWERS_FILE)


def read_answers(folder: Path) -> list[Answer]:
    """Reads what `write_answers` wrote; [] where no question was asked."""
    path = folder / ANSWERS_FILE
    return (
        [Answer(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )
