"""Splits hold no copies, share nothing, stay put as a corpus grows, and depend on no partition."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.data import CleanConfig, Deduplicate, Pii, SplitConfig
from qlora_dist.data.blocks import blocks_of
from qlora_dist.data.integrity import check_splits, own_text
from qlora_dist.data.overlap import Overlap
from qlora_dist.data.record import Record, parse_record
from qlora_dist.data.workers import Workers
from qlora_dist.errors import DataError

from .conftest import Corpus, sentence

Make = Callable[..., Corpus]
SPLITS = ("train", "validation", "test")


def near_copy(text: str) -> str:
    words = text.split()
    words[5] += "x"
    return " ".join(words)


def texts(corpus: Corpus, split: str) -> list[str]:
    return [record.text for record in corpus.read(split)]


def all_texts(corpus: Corpus) -> list[str]:
    return sorted(text for split in SPLITS for text in texts(corpus, split))


def test_every_record_is_kept_once_or_rejected_with_its_reason(corpus: Make) -> None:
    wanted = [sentence(i, 120) for i in range(100)]
    copies = [wanted[3], wanted[4].upper() + "!", near_copy(wanted[5])]
    made = corpus([{"text": t} for t in wanted], [{"text": t} for t in copies]).records().splits()
    assert all_texts(made) == sorted(wanted)
    rejects = made.rejects("splits")
    assert [r["reason"] for r in rejects] == ["exact copy", "exact copy", "near copy"]
    assert [(r["file"], r["line"]) for r in rejects] == [("001.jsonl", 1), ("001.jsonl", 2), ("001.jsonl", 3)]
    facts = made.facts["splits"]
    assert sum(facts["splits"][s]["records"] for s in SPLITS) + sum(facts["left_out"].values()) == facts["kept"] == 103


@settings(max_examples=15)
@given(
    numbers=st.lists(st.integers(0, 40), min_size=5, max_size=40),
    added=st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=20),
)
def test_what_is_appended_moves_nothing(tmp_path_factory: Any, numbers: list[int], added: list[Any]) -> None:
    before = [sentence(i, 60) for i in numbers]
    after = before + [near_copy(sentence(i, 60)) if near else sentence(i, 60) for i, near in added]
    made = []
    for name, examples in (("before", before), ("after", after)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in examples))
        made.append(_taken(folder, SplitConfig(validation_share=0.3, test_share=0.3, drop_contaminated=False)))
    for split in SPLITS:
        assert set(made[0][split]) <= set(made[1][split])


def _taken(folder: Path, split: SplitConfig) -> dict[str, list[str]]:
    """Splits without the mending of empty held-out sets, which only chance in tiny corpora makes necessary."""
    from qlora_dist.config.data import DomainConfig, SourceConfig
    from qlora_dist.data.decide import decide
    from qlora_dist.data.signatures import Index

    corpus = Corpus(folder, DomainConfig(sources=[SourceConfig(path=str(folder / "a.jsonl"))], split=split)).records()
    parts = list(corpus.parts().values())
    made = decide(Index(parts), split, folder / "scratch", Workers(1)).made.read(0, 10**6)
    records = [parse_record(line) for part in parts for line in (part / "records.jsonl").read_bytes().splitlines()]
    taken: dict[str, list[str]] = {name: [] for name in SPLITS}
    for i, record in enumerate(records):
        if made["copy_of"][i] < 0:
            taken[SPLITS[made["split"][i]]].append(record.text)
    return taken


@pytest.mark.parametrize("deduplicate", [Deduplicate.none, Deduplicate.exact])
def test_near_copies_that_stay_lie_in_one_split(corpus: Make, deduplicate: Deduplicate) -> None:
    originals = [sentence(i, 200) for i in range(60)]
    examples = originals + [near_copy(t) for t in originals] + [near_copy(near_copy(t)) for t in originals] + originals
    split = SplitConfig(deduplicate=deduplicate, validation_share=0.25, test_share=0.25, drop_contaminated=False)
    made = corpus([{"text": t} for t in examples], split=split).records().splits()
    assert len(all_texts(made)) == (240 if deduplicate is Deduplicate.none else 180)
    where = {text: name for name in SPLITS for text in texts(made, name)}
    assert all(where[t] == where[near_copy(t)] == where[near_copy(near_copy(t))] for t in originals)


def test_splits_are_the_same_bytes_whatever_the_parts(corpus: Make) -> None:
    examples = [{"text": sentence(i % 900, 40 + i % 7)} for i in range(1500)]
    made = [corpus(examples[:700], examples[700:], name=name, part_bytes=size).records().splits()
            for name, size in (("one", 2**28), ("many", 2**16))]  # fmt: skip
    assert len(made[1].parts()) > 2
    for file in (*(f"{split}.jsonl" for split in SPLITS), "rejects.jsonl"):
        assert (made[0].folder / "splits" / file).read_bytes() == (made[1].folder / "splits" / file).read_bytes()


def test_training_records_that_hold_a_held_out_text_are_dropped(corpus: Make) -> None:
    plain = [{"text": sentence(i, 60)} for i in range(200)]
    made = corpus(plain, name="clean").records().splits()
    held_out = texts(made, "test")[0]
    quoting = [{"text": f"{sentence(900 + i, 200)} {held_out} {sentence(950 + i, 200)}"} for i in range(10)]
    counts = []
    for name, drop in (("dropped", True), ("kept", False)):
        again = corpus(plain, quoting, name=name, split=SplitConfig(drop_contaminated=drop)).records().splits()
        found = sum(e["text"] in texts(again, "train") for e in quoting)
        counts.append((found, again.facts["splits"]["contaminated"], len(again.rejects("splits"))))
        assert set(texts(made, "test")) <= set(texts(again, "test"))
    assert counts[1][0] > 3
    assert counts == [(0, counts[1][0], counts[1][0]), (counts[1][0], counts[1][0], 0)]


def test_too_many_broken_lines_are_an_error_that_lists_them(corpus: Make) -> None:
    examples = [{"text": sentence(i)} for i in range(90)] + ["{broken", '{"text": 5}'] * 5
    made = corpus(examples).records()
    with pytest.raises(DataError) as caught:
        made.splits()
    says = str(caught.value)
    assert "10 of 100 examples can't be used, more than max_reject_share=0.05" in says
    assert "000.jsonl:91: broken JSON" in says
    assert "000.jsonl:92: wrong type (text: expected text, found int)" in says
    assert len(corpus(examples, name="lenient", max_reject_share=0.1).records().splits().rejects("records-0")) == 10


def test_personal_data_that_was_replaced_is_counted_over_all_parts(corpus: Make) -> None:
    examples = [{"text": f"{sentence(i, 200)} mail a{i}@b.example"} for i in range(100)]
    made = corpus(examples, clean=CleanConfig(pii=Pii.patterns), part_bytes=2**16).records().splits()
    assert len(made.parts()) > 1
    assert made.facts["splits"]["replaced"] == {"EMAIL": 100}


def test_records_dropped_by_wish_do_not_count_as_broken(corpus: Make) -> None:
    examples = [{"text": sentence(i)} for i in range(50)] + [{"text": "tiny"}] * 50
    made = corpus(examples, clean=CleanConfig(min_chars=50)).records().splits()
    assert made.facts["splits"]["reasons"] == {"too short": 50}


def test_a_torn_file_is_an_error_at_any_share_of_rejects(corpus: Make, tmp_path: Path) -> None:
    made = corpus([{"text": sentence(i)} for i in range(500)])
    (tmp_path / "law" / "raw" / "torn.json").write_text('[{"text": "one"}, {"text":')
    with pytest.raises(DataError, match=r"can't be read to their end[\s\S]*torn\.json"):
        made.records().splits()


def test_nothing_left_is_an_error(corpus: Make) -> None:
    with pytest.raises(DataError, match="no record is left"):
        corpus(["", " "]).records().splits()
    with pytest.raises(DataError, match="can't be divided"):
        corpus([{"text": sentence(1)}] * 3, name="copies").records().splits()


def test_held_out_sets_of_small_corpora_are_never_empty(corpus: Make) -> None:
    for number in range(8):
        examples = [{"text": sentence(100 * number + i)} for i in range(4)]
        made = corpus(examples, name=f"small{number}").records().splits()
        assert all(texts(made, split) for split in SPLITS)
    split = SplitConfig(validation_share=0, test_share=0)
    made = corpus([{"text": sentence(1)}], name="all", split=split).records().splits()
    assert [len(texts(made, s)) for s in SPLITS] == [1, 0, 0]


def test_licence_and_source_are_carried_to_the_splits(corpus: Make) -> None:
    made = corpus([{"text": sentence(i)} for i in range(20)], source={"licence": "CC0-1.0"}).records().splits()
    assert {(r.licence, r.file) for r in made.read("train")} == {("CC0-1.0", "000.jsonl")}
    assert made.facts["splits"]["splits"]["train"]["licence CC0-1.0"] == len(made.read("train"))


def test_licences_are_counted_by_name_up_to_a_bound(corpus: Make) -> None:
    examples = [{"text": sentence(i), "license": "MIT" if i % 2 else f"own {i}"} for i in range(200)]
    made = corpus(examples, source={"licence": "CC0-1.0"}).records().splits()
    train = made.facts["splits"]["splits"]["train"]
    licences = {name: num for name, num in train.items() if name.startswith("licence ")}
    assert sum(licences.values()) == train["records"]
    assert licences["licence MIT"] == sum(r.licence == "MIT" for r in made.read("train"))
    assert len(licences) == 51
    assert licences["licence (others)"] > 10


@pytest.mark.parametrize("fault", ["record", "text", "near"])
def test_the_check_of_its_own_sees_what_crosses_a_split(corpus: Make, fault: str) -> None:
    made = corpus([{"text": sentence(i, 300)} for i in range(60)]).records().splits()
    folder = made.folder / "splits"
    stray = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    if fault != "record":
        stray |= {"id": "0" * 16, "cluster": "0" * 16}
        stray["text"] = stray["text"].title() if fault == "text" else near_copy(stray["text"])
    with (folder / "train.jsonl").open("a") as train:
        train.write(json.dumps(stray) + "\n")
    with pytest.raises(DataError, match="Split integrity"):
        check_splits(folder, 0.8, Workers(1))


def written(path: Path, records: list[str]) -> Path:
    path.write_text("".join(Record(kind="text", text=t, id=f"{i:016x}").to_line() for i, t in enumerate(records)))
    return path


@given(st.integers(0, 10_000), st.sampled_from([0, 25]))
@settings(max_examples=20)
def test_shares_of_held_out_texts_are_exact_or_estimated_by_some_of_their_runs(
    tmp_path_factory: Any, seed: int, most_runs: int
) -> None:
    folder = tmp_path_factory.mktemp("overlap")
    held = [sentence(seed + i, 400) for i in range(20)] + ["one two three four five"]
    words = held[3].split()
    others = [" ".join(words[:201]), held[3], "six one two three four five", "something else"]
    blocks = [blocks_of([written(folder / name, texts)]) for name, texts in (("held", held), ("others", others))]
    [found] = Overlap(*blocks, own_text, 3, folder / "scratch", most_runs).find(Workers(1))
    assert found["line"].tolist() == [0, 1, 2]
    assert [int(parse_record(blocks[0][0].line_at(at)).id, 16) for at in found["offset"]] == [3, 3, 20]
    assert found["contained"][0] == pytest.approx(0.5, abs=0.35 if most_runs else 1e-9)
    assert found["contained"][1:].tolist() == [1, 1]
    assert not (folder / "scratch").exists()


def test_questions_on_one_context_are_no_copies_and_lie_in_one_split(corpus: Make) -> None:
    examples = [
        {"context": sentence(i, 150), "question": f"What of {sentence(1000 + 7 * i + j, 6)}?", "answer": f"It is {j}."}
        for i in range(60)
        for j in range(4)
    ]
    made = corpus(examples).records().splits()
    assert made.facts["splits"]["left_out"] == {}
    where: dict[str, set[str]] = {}
    for split in SPLITS:
        for record in made.read(split):
            where.setdefault(record.context(), set()).add(split)
    assert len(where) == 60
    assert all(len(splits) == 1 for splits in where.values())


def test_a_system_prompt_that_all_share_makes_no_copies_and_contaminates_nothing(corpus: Make) -> None:
    system = sentence(5, 200)
    examples = [
        {"system": system, "instruction": sentence(i, 20), "response": sentence(900 + i, 20)} for i in range(50)
    ]
    made = corpus(examples).records().splits()
    assert made.facts["splits"]["left_out"] == {}
