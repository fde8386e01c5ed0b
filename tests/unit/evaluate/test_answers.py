"""Answers of each kind have the measures of their kind; calibration is what its formula says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlora_dist.data.record import Record
from qlora_dist.evaluate.answers import _Judge, answer_rows, count_failures
from qlora_dist.evaluate.calibration import Calibration, read_calibration, write_calibration
from qlora_dist.evaluate.generate import Generated
from qlora_dist.evaluate.likelihood import Slots

ALWAYS = {"exact_match", "repetition", "answer_tokens", "ended"}
TERMS = frozenset({"licensee", "warranty"})


def record(kind: str, question: str, reference: str, name: str = "r") -> Record:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reference}]
    return Record(kind=kind, messages=turns, id=name, cluster=name)  # type: ignore[arg-type]


def said(text: str) -> Generated:
    return Generated(text=text, num_tokens=len(text.split()), ended=True)


def test_rag_answers_are_judged_by_the_context_and_by_the_domains_terms() -> None:
    judge = _Judge("legal", "test", TERMS, None)
    asked = record("rag", "Acme grants the licensee rights until 2004. Until when?", "The licensee, until 2004.")
    faithful = judge(asked, said("until 2004 for the licensee")).measures
    invented = judge(asked, said("until 1998 for Zenith")).measures
    assert set(faithful) >= ALWAYS | {"token_f1", "term_recall", "support"}
    assert (faithful["support"], faithful["term_recall"]) == (1.0, 1.0)
    assert (invented["support"], invented["term_recall"]) == (pytest.approx(1 / 3), 0.0)
    plain = judge(record("instruction", "Say no.", "no"), said("no")).measures
    assert "support" not in plain, "without a context nothing can be unfaithful"
    assert "term_recall" not in plain, "its reference has none of the domain's terms"


def test_classes_are_counted_by_accuracy_and_macro_f1_and_prose_measures_are_left_out() -> None:
    judge = _Judge("legal", "test", TERMS, None)
    wanted = ["valid"] * 8 + ["void"] * 2
    answers = [judge(record("classification", f"{i}?", name, f"r{i}"), said("valid")) for i, name in enumerate(wanted)]
    assert set(answers[0].measures) == ALWAYS | {"accuracy"}
    rows = {row["metric"]: row for row in answer_rows("base", answers)}
    assert rows["accuracy"]["value"] == pytest.approx(0.8)
    assert rows["macro_f1"]["value"] == pytest.approx((2 * 8 / 18 + 0) / 2)
    assert rows["accuracy"]["num_documents"] == 10


def test_forms_are_judged_where_references_are_json_and_failures_counted() -> None:
    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    judge = _Judge("legal", "test", frozenset(), schema)
    asked = record("instruction", "Which city?", '{"city": "Oru"}')
    found = [judge(asked, said(text)) for text in ('{"city": "Bel"}', '{"city": 3}', '{"city": "Or', "Oru")]
    assert [a.measures["json_valid"] for a in found] == [1, 1, 0, 0]
    assert [a.measures["schema_valid"] for a in found] == [1, 0, 0, 0]
    assert count_failures(found) == {"legal": {"wrong type": 1, "cut off": 1, "not JSON": 1}}


def slots(confidence: list[float], correct: list[float]) -> Slots:
    zero = np.zeros((1, len(confidence)))
    return Slots(nll_BT=zero, confidence_BT=np.array([confidence]), correct_BT=np.array([correct]), kl_BT=zero)


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_targets(tmp_path: Path) -> None:
    found = Calibration()
    found.add(slots([0.91, 0.93, 0.91, 0.93, 0.5], [1, 1, 1, 0, 1]), np.array([[True] * 4 + [False]]))
    found.add(slots([0.1, 1.0], [1, 1]), np.array([[True, True]]))
    # Three bins: |0.92 - 0.75| of four targets, |0.1 - 1| of one, |1 - 1| of one; what is no target isn't counted.
    assert found.error() == pytest.approx((4 * 0.17 + 0.9 + 0) / 6)
    assert found.bins()["count"] == [1, 4, 1]
    assert found.bins()["accuracy"] == [1.0, 0.75, 1.0]
    write_calibration({"legal": found}, tmp_path)
    assert read_calibration(tmp_path)["legal"].error() == found.error()


def test_model_that_is_right_as_often_as_it_is_sure_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 200_000)
    right = (rng.uniform(0, 1, len(confidence)) < confidence).astype(float)
    honest, boastful = Calibration(), Calibration()
    trained = np.ones((1, len(confidence)), dtype=bool)
    honest.add(slots(list(confidence), list(right)), trained)
    boastful.add(slots(list(np.sqrt(confidence)), list(right)), trained)
    assert honest.error() < 0.01
    assert boastful.error() == pytest.approx(2 / 3 - 1 / 2, abs=0.01), "the mean of √u is 2/3, that of u 1/2"
