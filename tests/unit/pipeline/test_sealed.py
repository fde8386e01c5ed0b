"""The ledger of the sealed test: one reading a choice, and a later choice is told that it comes late."""

import json
import uuid
from pathlib import Path

import pytest

from qlora_dist.launch.compose import compose_run
from qlora_dist.pipeline.nodes import make_plan
from qlora_dist.pipeline.plan import Plan
from qlora_dist.pipeline.sealed import choice_of, note_reading, sealed_sets, warnings_of


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(20)))
    return folder


@pytest.fixture(params=["folder", "url"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/runs"


def plan_of(corpus: Path, root: str, *overrides: str) -> Plan:
    sources = [f"domain.files.sources=[{{path: {corpus}}}]", f"general.sources=[{{path: {corpus}}}]"]
    return make_plan(compose_run(["domain=files", "train=tiny", *sources, f"root={root}", *overrides]))


def read_all(plan: Plan) -> None:
    for node in plan.nodes:
        note_reading(plan, node)


def test_one_choice_reads_each_sealed_set_once_however_often_it_runs(corpus: Path, root: str) -> None:
    plan = plan_of(corpus, root)
    assert sealed_sets(plan) == []
    read_all(plan)
    first = sealed_sets(plan)
    read_all(plan)
    assert sealed_sets(plan) == first
    assert [row["domain"] for row in first] == ["files", "general"]
    assert all(row["set"].startswith(f"splits/{row['domain']}-") for row in first)
    assert {row["choice"] for row in first} == {choice_of(plan)} == {plan.node("merged/all").id}
    assert set(first[0]["models"]) == {"files-0", "files-1", "merged"}, "the base is no choice"
    assert [row["before"] for row in first] == [[], []]
    assert warnings_of(first) == []


def test_later_choice_sees_who_read_before_it_and_the_first_one_does_not(
    corpus: Path, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, later = plan_of(corpus, root, "name=one"), plan_of(corpus, root, "name=two", "lora.lora_rank=4")
    read_all(first)
    assert "was read before" not in caplog.text
    read_all(later)
    assert f"was read before, for {choice_of(first)}" in caplog.text
    assert warnings_of(sealed_sets(first)) == [], "what came later spoils nothing for it"
    (row, _) = sealed_sets(later)
    assert [(b["choice"], b["experiment"]) for b in row["before"]] == [(choice_of(first), "one")]
    (warning,) = warnings_of(sealed_sets(later))
    assert "files, general" in warning
    assert "evaluate.split=validation" in warning


def test_other_rows_of_the_same_records_are_the_same_sealed_set(corpus: Path, root: str) -> None:
    first, later = plan_of(corpus, root), plan_of(corpus, root, "train.row_tokens=128", "train.tokens_per_step=2048")
    read_all(first)
    read_all(later)
    assert first.node("rows/files-test").id != later.node("rows/files-test").id
    assert len(sealed_sets(later)[0]["before"]) == 1


def test_development_data_are_read_as_often_as_one_likes(corpus: Path, root: str) -> None:
    for rank in (4, 8):
        plan = plan_of(corpus, root, "evaluate.split=validation", f"lora.lora_rank={rank}")
        read_all(plan)
        assert sealed_sets(plan) == []
