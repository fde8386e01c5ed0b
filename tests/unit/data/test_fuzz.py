"""Any bytes at all become records or counted rejects: no traceback, nothing lost."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.data import CleanConfig, DomainConfig, SourceConfig
from qlora_dist.data.formats import READERS, UNREADABLE
from qlora_dist.errors import QloraDistError

from .conftest import Corpus, save_tokenizer, sentence

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just("a\x00b"), st.just("\ud800"), st.just("")
)


def nested(inner: Any) -> Any:
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3))


values = st.recursive(scalars, nested, max_leaves=8)
names = st.sampled_from(
    ["text", "instruction", "response", "input", "output", "context", "question", "messages", "conversations", "chosen",
     "rejected", "prompt", "label", "system", "x", "\ud800"]
)  # fmt: skip
roles = st.one_of(values, st.sampled_from(["user", "assistant", "system", "tool", "pilot", "\udfff"]))
turns = st.lists(st.one_of(values, st.fixed_dictionaries({"role": roles, "content": values})), max_size=4)
examples = st.one_of(values, st.dictionaries(names, st.one_of(values, turns), max_size=5))
BOMB = '{"text": ' + "[" * 100_000


def taken(folder: Path, path: Path, **clean: Any) -> dict[str, Any]:
    domain = DomainConfig(sources=[SourceConfig(path=str(path))], clean=CleanConfig(**clean))
    made = Corpus(folder, domain).records()
    facts = made.facts["records-0"]
    lines = (folder / "records-0" / "records.jsonl").read_bytes().splitlines()
    rejects = made.rejects("records-0")
    assert len(lines) == facts["kept"]
    assert len(rejects) == facts["broken"] + facts["dropped"] == sum(facts["reasons"].values())
    assert all(r["reason"] and r["file"] for r in rejects)
    return facts


@settings(max_examples=80)
@given(st.lists(examples, max_size=6))
def test_any_json_lines_are_kept_or_counted_one_by_one(tmp_path_factory: Any, raw: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [json.dumps(e) for e in raw] + [BOMB, json.dumps({"text": sentence(1)})]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = taken(folder, folder / "a.jsonl")
    assert facts["kept"] + facts["broken"] + facts["dropped"] == len(lines)
    assert facts["kept"] >= 1


@settings(max_examples=80)
@given(st.binary(max_size=300), st.sampled_from(sorted(READERS)), st.booleans())
def test_random_bytes_in_any_format_never_raise(
    tmp_path_factory: Any, raw: bytes, suffix: str, is_gzipped: bool
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / f"a{suffix}{'.gz' if is_gzipped else ''}"
    path.write_bytes(gzip.compress(raw) if is_gzipped else raw or b" ")
    facts = taken(folder, path)
    if suffix == ".jsonl" and raw[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        num_lines = sum(bool(line.strip()) for line in raw.split(b"\n"))
        assert facts["kept"] + facts["broken"] == num_lines + facts["reasons"].get(UNREADABLE, 0)


@settings(max_examples=25)
@given(st.lists(st.dictionaries(names, st.one_of(st.text(max_size=30), turns), min_size=1, max_size=4), max_size=8))
def test_what_is_kept_goes_all_the_way_to_rows_or_ends_in_a_clear_error(tmp_path_factory: Any, raw: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    tokenizer = save_tokenizer(folder / "tokenizer")
    lines = [json.dumps(e) for e in [*raw, *({"text": sentence(i)} for i in range(4))]]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    domain = DomainConfig(sources=[SourceConfig(path=str(folder / "a.jsonl"))], max_reject_share=1, num_shards=1)
    made = Corpus(folder, domain).records().splits().shards(tokenizer)
    try:
        rows = made.rows(tokenizer, shard=0)
    except QloraDistError as error:
        assert "no token would be trained" in str(error)
        return
    facts = made.facts["rows-train-0"]
    assert len(rows.records) == facts["records"]
    assert facts["records"] + sum(facts["left_out"].values()) == len(made.read("train"))


def test_lines_of_a_hundred_megabytes_cost_a_buffer_and_a_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write('{"text": "' + "x" * 100_000_000 + '"}\n')
        file.write(json.dumps({"text": sentence(2)}) + "\n")
    facts = taken(tmp_path, path)
    assert facts["reasons"] == {"line too long": 1}
    assert facts["kept"] == 1


@pytest.mark.parametrize("text", ["\ud800", "a\x00b", "\u202e" * 50, "\U0010ffff", "\n" * 5000, " "])
def test_odd_text_is_kept_clean_or_counted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"instruction": text, "response": "yes " + text}) + "\n"
    )
    facts = taken(tmp_path, path)
    assert facts["kept"] + facts["broken"] == 2
