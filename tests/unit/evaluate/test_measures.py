from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.evaluate import measures
from qlora_dist.evaluate.schema import infer_schema, schema_failure, schema_of_references
from qlora_dist.evaluate.terms import TermMarker, domain_terms
from qlora_dist.testing import save_byte_tokenizer

texts = st.text(max_size=40)


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1"),
    [
        ("The Court.", "court", 1, 1),
        ("a b c d", "c d e f", 0, 4 / 7),
        ("", "x", 0, 0),
        ("", "", 1, 1),
        ("yes yes", "yes", 0, 2 / 3),
    ],
)
def test_match_and_f1_agree_with_worked_examples(answer: str, reference: str, match: float, f1: float) -> None:
    assert measures.exact_match(answer, reference) == match
    assert measures.token_f1(answer, reference) == pytest.approx(f1)


@given(texts, texts)
def test_f1_is_symmetric_within_bounds_and_one_for_a_match(a: str, b: str) -> None:
    assert 0 <= measures.token_f1(a, b) <= 1
    assert measures.token_f1(a, b) == measures.token_f1(b, a)
    assert measures.token_f1(a, a) == 1
    if measures.exact_match(a, b):
        assert measures.token_f1(a, b) == 1


def test_rouge_l_follows_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score", reason="pip install -e .[tasks]")
    # police killed the gunman / police kill the gunman: LCS of 3 words out of 4 and 4 (Lin, 2004, section 3.1).
    assert measures.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)


def test_repetition_finds_loops() -> None:
    assert measures.repetition("one two three four five six") == 0
    assert measures.repetition("no more " * 30) > 0.9
    assert measures.repetition("") == 0


def test_support_falls_with_what_the_context_does_not_hold() -> None:
    context = "The licence of 1998 was granted by Acme to every licensee."
    assert measures.support("granted by Acme in 1998", context) == 1
    assert measures.support("granted by Zenith in 2004", context) == pytest.approx(1 / 3)
    assert measures.support("no", context) is None


def test_terms_are_frequent_in_the_domain_and_rare_elsewhere() -> None:
    domain = ["the licensor grants the licensee a licence without warranty"] * 5
    general = ["the weather was grand without doubt and people went home"] * 5
    terms = domain_terms(domain, general)
    assert {"licensor", "licensee", "warranty"} <= terms
    assert not {"without", "the", "weather"} & terms
    assert measures.term_recall("the licensee pays", "licensor and licensee", terms) == 0.5
    assert measures.term_recall("anything", "nothing of the kind", terms) is None


def test_macro_f1_weighs_rare_classes_as_much_as_common_ones() -> None:
    references = ["a"] * 8 + ["b"] * 2
    assert measures.macro_f1(references, references) == 1
    always = measures.macro_f1(["A."] * 10, references)
    assert always == pytest.approx((2 * 8 / 18) / 2)
    assert measures.macro_f1(["nonsense"] * 10, references) == 0


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ('{"a": 1}', ""),
        ("", "empty"),
        ('Here it is: {"a": 1}', "text around JSON"),
        ('{"a": 1} Hope that helps!', "text around JSON"),
        ('{"a": {"b": [1, 2', "cut off"),
        ("{'a': 1}", "not JSON"),
        ("no idea", "not JSON"),
    ],
)
def test_wrong_json_is_told_by_kind(text: str, failure: str) -> None:
    assert measures.read_json(text)[1] == failure


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, min_size=1, max_size=4))
def test_inferred_schema_takes_every_value_it_was_inferred_from(values: list[object]) -> None:
    schema = infer_schema(values)
    assert [schema_failure(v, schema) for v in values] == [""] * len(values)


def test_schema_refuses_absent_unknown_and_mistyped_keys_by_kind() -> None:
    references = [json.dumps({"party": "A", "year": 1998}), json.dumps({"party": "B", "year": 2004, "note": "x"})]
    schema = schema_of_references(references)
    assert schema is not None
    assert schema_failure({"party": "C", "year": 1}, schema) == ""
    assert schema_failure({"party": "C"}, schema) == "missing key"
    assert schema_failure({"party": "C", "year": "1998"}, schema) == "wrong type"
    assert schema_failure({"party": "C", "year": 1, "mood": "x"}, schema) == "unknown key"
    assert schema_of_references(["plain text", references[0]]) is None


def test_terms_are_marked_among_the_targets_whole_or_not_at_all(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 259}')
    marker = TermMarker(tmp_path, {"licensee"})
    text = "The Licensee, licensees: licensee"
    tokens_T = np.array(marker._tokenizer.encode(text, add_special_tokens=False).ids)
    marked_T, num_terms = marker.mark(tokens_T, np.ones(len(text), dtype=bool))
    assert "".join(c for c, m in zip(text, marked_T, strict=True) if m) == "Licenseelicensee"
    assert num_terms == 2
    cut_T = np.ones(len(text), dtype=bool)
    cut_T[6] = False
    assert marker.mark(tokens_T, cut_T)[1] == 1
