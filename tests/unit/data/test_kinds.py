"""Raw examples become records of the kind that their fields say."""

from typing import Any

import pytest

from qlora_dist.config.data import Kind
from qlora_dist.data.kinds import UnusableError, columns, make_record

U, A, S = "user", "assistant", "system"
TABLE: list[tuple[dict[str, Any], str, list[tuple[str, str]]]] = [
    ({"instruction": "q", "response": "r"}, "instruction", [(U, "q"), (A, "r")]),
    ({"prompt": "q", "completion": "r"}, "instruction", [(U, "q"), (A, "r")]),
    ({"question": "q", "answer": "r", "extra": 3}, "instruction", [(U, "q"), (A, "r")]),
    ({"instruction": "q", "input": "i", "output": "r"}, "instruction", [(U, "q\n\ni"), (A, "r")]),
    ({"instruction": "q", "input": "", "output": "r"}, "instruction", [(U, "q"), (A, "r")]),
    ({"input": "i", "output": "r", "system": "s"}, "instruction", [(S, "s"), (U, "i"), (A, "r")]),
    ({"context": "c", "question": "q", "answer": "r"}, "rag", [(U, "Context:\nc\n\nQuestion:\nq"), (A, "r")]),
    ({"context": ["c", "d"], "query": "q", "answer": "r"}, "rag", [(U, "Context:\nc\n\nd\n\nQuestion:\nq"), (A, "r")]),
    (
        {"messages": [{"role": S, "content": "s"}, {"role": U, "content": "q"}, {"role": A, "content": "r"}]},
        "chat",
        [(S, "s"), (U, "q"), (A, "r")],
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "s"},
        "chat",
        [(S, "s"), (U, "q"), (A, "r")],
    ),
    (
        {"messages": [{"role": U, "content": [{"type": "text", "text": "q"}]}, {"role": A, "content": "r"},
                      {"role": U, "content": "unanswered"}]},
        "chat",
        [(U, "q"), (A, "r")],
    ),
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference", [(U, "q"), (A, "good")]),
    (
        {"chosen": [{"role": U, "content": "q"}, {"role": A, "content": "good"}],
         "rejected": [{"role": U, "content": "q"}, {"role": A, "content": "bad"}]},
        "preference",
        [(U, "q"), (A, "good")],
    ),
    ({"text": "t", "label": "spam"}, "classification", [(U, "t"), (A, "spam")]),
    ({"text": "t", "label": 3}, "classification", [(U, "t"), (A, "3")]),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "kind", "turns"), TABLE)
def test_kinds_are_told_by_their_fields(raw: dict[str, Any], kind: str, turns: list[tuple[str, str]]) -> None:
    record = make_record(raw)
    assert record.kind == kind
    assert [(m["role"], m["content"]) for m in record.messages] == turns
    assert record.rejected == ("bad" if kind == "preference" else "")


def test_running_text_is_text() -> None:
    assert make_record("words").text == make_record({"content": "words"}).text == "words"


def test_the_kind_and_the_names_of_fields_can_be_told() -> None:
    raw = {"text": "t", "label": "x", "frage": "q", "antwort": "r"}
    assert make_record(raw, Kind.text).text == "t"
    told = make_record(raw, Kind.instruction, {"instruction": "frage", "response": "antwort"})
    assert [m["content"] for m in told.messages] == ["q", "r"]


def test_a_mapped_field_is_never_taken_from_another_column() -> None:
    with pytest.raises(UnusableError) as caught:
        make_record({"prompt": "q", "response": "wrong one"}, Kind.instruction, {"response": "answer_text"})
    assert (caught.value.reason, caught.value.detail) == ("absent field", "response")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (3, "not an object"),
        (None, "not an object"),
        ([{"text": "a"}], "not an object"),
        ({}, "unknown fields"),
        ({"text": None}, "unknown fields"),
        ({"text": 5}, "wrong type"),
        ({"text": " \n"}, "empty field"),
        ({"instruction": "q", "response": ["r"]}, "wrong type"),
        ({"instruction": "q", "response": ""}, "empty field"),
        ({"messages": "q"}, "wrong type"),
        ({"messages": []}, "empty field"),
        ({"messages": [3]}, "wrong type"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no answer"),
        ({"messages": [{"role": "pilot", "content": "q"}]}, "unknown role"),
        ({"messages": [{"role": "assistant", "content": "r"}]}, "wrong turns"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "r"}]}, "wrong turns"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no answer"),
        ({"messages": [{"role": "user", "content": "q"}] * 2 + [{"role": "assistant", "content": "r"}]}, "wrong turns"),
        ({"prompt": "q", "chosen": "a", "rejected": 4}, "wrong type"),
        ({"chosen": "a", "rejected": "b"}, "wrong turns"),
    ],
)
def test_what_no_kind_fits_is_refused_with_its_reason(raw: Any, reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        make_record(raw)
    assert caught.value.reason == reason


def test_a_records_own_licence_is_read_where_it_is_a_name() -> None:
    assert make_record({"text": "t", "license": "MIT"}).licence == "MIT"
    assert make_record({"text": "t", "rights": "CC0"}, fields={"licence": "rights"}).licence == "CC0"
    for odd in (["MIT"], 3, "x" * 101, "a\nb", "\ud800"):
        assert make_record({"text": "t", "licence": odd}).licence == ""


def test_columns_are_named_for_each_field() -> None:
    raw = {"frage": "q", "answer": "r", "response": None, "id": 3}
    assert columns(raw, {"instruction": "frage"}) == {"instruction": "frage", "response": "answer"}


def test_names_of_columns_are_known_whatever_their_case_and_blanks() -> None:
    raw = {"Question": "q", " ANSWER ": "r", "System-Prompt": "s", "id": 3}
    assert columns(raw, {}) == {"instruction": "Question", "response": " ANSWER ", "system": "System-Prompt"}
    assert columns({"Text": "no", "text": "yes", "TEXT": None}, {}) == {"text": "text"}
    assert columns({"Text": "t", "text": None}, {}) == {"text": "Text"}
    assert columns({"Frage": "q"}, {"instruction": "frage"}) == {}  # what is told is taken by the letter


def test_equal_content_has_one_id_wherever_it_stands() -> None:
    a, b = make_record({"prompt": "q", "answer": "r"}), make_record({"instruction": "q", "response": "r"})
    assert a.content_id() == b.content_id() != make_record({"prompt": "q", "answer": "r "}).content_id()
