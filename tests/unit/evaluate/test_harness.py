from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_dist.config.evaluate import EvaluateConfig
from qlora_dist.config.stages import BaseConfig, RowsConfig, ScoresConfig
from qlora_dist.data.record import Record
from qlora_dist.data.rows import write_rows
from qlora_dist.errors import ConfigError
from qlora_dist.evaluate.compare import compare_models
from qlora_dist.evaluate.scores import score_model
from qlora_dist.model.base import prepare_base
from qlora_dist.testing import save_tiny_model

from .models import model_config, save_lora

pytest.importorskip("lm_eval", reason="pip install -e .[lm-eval]")
pytestmark = pytest.mark.slow
TEXTS = [f"Clause {i}: the licensee shall pay fee {7 * i} within {i + 3} days – naïvely." for i in range(12)]
TASK = """\
task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
"""
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("harness")
    tokenizer = save_tiny_model(root / "model")
    for name in ("base", "splits", "rows", "tasks"):
        (root / name).mkdir()
    prepare_base(BaseConfig(model=model_config(root)), {}, root / "base")
    records = [Record(kind="text", text=text) for text in TEXTS]
    for record in records:
        record.id = record.cluster = record.content_id()
    (root / "splits" / "test.jsonl").write_text("".join(r.to_line() for r in records), encoding="utf-8")
    write_rows(
        RowsConfig(split="test", row_tokens=128), {"tokenizer": tokenizer, "splits": root / "splits"}, root / "rows"
    )
    data = root / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    (root / "tasks" / "local.yaml").write_text(TASK.format(file=data), encoding="utf-8")
    asked = root / "choices.jsonl"
    lines = [
        json.dumps({"text": text[:20], "choices": ["fee", "day", "sum"], "gold": i % 3}) for i, text in enumerate(TEXTS)
    ]
    asked.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "tasks" / "choice.yaml").write_text(CHOICE.format(file=asked), encoding="utf-8")
    return {
        "root": root,
        "base": root / "base",
        "tokenizer": tokenizer,
        "rows-legal": root / "rows",
        "adapter": save_lora(root / "base", root / "adapter", scale=0.2),
    }


def score(
    inputs: dict[str, Path], out: Path, tasks: list[str], *, adapted: bool = False
) -> dict[tuple[str, str], float]:
    told = EvaluateConfig(lm_eval_tasks=tasks, lm_eval_folder=str(inputs["root"] / "tasks"), max_answers=0)
    given = {k: v for k, v in inputs.items() if k != "root" and (adapted or k != "adapter")}
    config = ScoresConfig(model=model_config(inputs["root"]), evaluate=told, name="m")
    facts = score_model(config, given, out)
    return {(r["domain"], r["metric"]): r["value"] for r in facts["scores"]}


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("base", "merged")}


@pytest.fixture(scope="module")
def values(inputs: dict[str, Path], outs: dict[str, Path]) -> list[dict[tuple[str, str], float]]:
    """The scores of the base, and of the base with the adapter."""
    tasks = ["local_texts", "local_choice"]
    return [score(inputs, outs[name], tasks, adapted=adapted) for name, adapted in (("base", False), ("merged", True))]


@pytest.mark.parametrize("adapted", [False, True])
def test_bits_per_byte_equal_those_of_lm_eval_to_four_places(
    values: list[dict[tuple[str, str], float]], adapted: bool
) -> None:
    value = values[adapted]
    assert value["legal", "bits_per_byte"] == pytest.approx(value["local_texts", "bits_per_byte"], abs=1e-4)
    assert value["local_texts", "byte_perplexity"] == pytest.approx(2 ** value["legal", "bits_per_byte"], rel=1e-3)


def test_adapter_is_what_the_harness_measures(values: list[dict[tuple[str, str], float]]) -> None:
    assert abs(values[0]["local_texts", "bits_per_byte"] - values[1]["local_texts", "bits_per_byte"]) > 0.01


def test_tasks_stand_in_the_same_tables_with_intervals_and_differences_from_the_base(
    values: list[dict[tuple[str, str], float]], outs: dict[str, Path]
) -> None:
    rows = json.loads((outs["merged"] / "scores.json").read_text())["rows"]
    table = {(r["domain"], r["metric"]): r for r in rows}
    assert {("local_choice", "acc"), ("local_texts", "bits_per_byte"), ("legal", "bits_per_byte")} <= set(table)
    ours, theirs = table["legal", "bits_per_byte"], table["local_texts", "bits_per_byte"]
    assert [theirs[end] for end in ("low", "high")] == pytest.approx([ours[end] for end in ("low", "high")], abs=1e-3)
    compared = {(r["domain"], r["metric"]): r for r in compare_models(outs)}
    assert compared["local_texts", "bits_per_byte"]["difference"] == pytest.approx(
        compared["legal", "bits_per_byte"]["difference"], abs=1e-4
    )
    accuracies = [value["local_choice", "acc"] for value in values]
    assert compared["local_choice", "acc"]["difference"] == pytest.approx(accuracies[1] - accuracies[0])
    assert ("local_texts", "byte_perplexity") not in compared, "no ratio of sums, so no pairs"


def test_unknown_task_is_refused_with_the_nearest_name(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean local_texts"):
        score(inputs, tmp_path, ["local_text"])
