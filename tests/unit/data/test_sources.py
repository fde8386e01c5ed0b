"""Sources become parts whose order and digest depend on the bytes alone."""

import gzip
import json
import os
from pathlib import Path

import pytest

from qlora_dist.config.data import DomainConfig, SourceConfig
from qlora_dist.data import installed
from qlora_dist.data.record import Reject
from qlora_dist.data.sources import Piece, files_of, leaf_digest, plan_parts, read_piece
from qlora_dist.errors import ConfigError, DataError


def domain(*paths: str, part_bytes: int = 2**28, **source: str) -> DomainConfig:
    return DomainConfig(sources=[SourceConfig(path=p, **source) for p in paths], part_bytes=part_bytes)


def lines(folder: Path, name: str, first: int, last: int) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"text {i} " + "x" * (i % 97)}) + "\n" for i in range(first, last)))
    return path


def texts(config: DomainConfig) -> list[str]:
    found = []
    for part in plan_parts(config):
        for text in part:
            piece = Piece.parse(text)
            for item in read_piece(piece, config.sources[piece.source]):
                assert not isinstance(item, Reject)
                found.append(item[2]["text"])
    return found


def test_small_corpora_are_one_part(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", 0, 5), lines(tmp_path, "b.jsonl", 5, 9)
    assert len(plan_parts(domain(str(tmp_path)))) == 1


@pytest.mark.parametrize("part_bytes", [2**16, 100_001, 2**20])
def test_examples_come_in_one_order_whatever_the_parts(tmp_path: Path, part_bytes: int) -> None:
    lines(tmp_path, "b.jsonl", 3000, 9000), lines(tmp_path, "a.jsonl", 0, 3000)
    config = domain(str(tmp_path / "*.jsonl"), part_bytes=part_bytes)
    assert len(plan_parts(config)) > 1 or part_bytes == 2**20
    assert texts(config) == [f"text {i} " + "x" * (i % 97) for i in range(9000)]


def test_a_folder_a_glob_and_its_files_name_the_same(tmp_path: Path) -> None:
    a, b = lines(tmp_path, "a.jsonl", 0, 3), lines(tmp_path, "deep/b.jsonl.gz", 3, 6)
    b.write_bytes(gzip.compress(b.read_bytes()))
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    assert files_of(SourceConfig(path=str(tmp_path))) == [a, b]
    assert files_of(SourceConfig(path=str(tmp_path / "**" / "*.jsonl*"))) == [a, b]


def test_the_digest_is_of_the_bytes_not_the_names(tmp_path: Path) -> None:
    a = lines(tmp_path / "one", "a.jsonl", 0, 50)
    b = lines(tmp_path / "two", "renamed.jsonl", 0, 50)
    [first], [second] = plan_parts(domain(str(a))), plan_parts(domain(str(b)))
    assert leaf_digest(first) == leaf_digest(second)
    b.write_text(b.read_text() + '{"text": "more"}\n')
    assert leaf_digest(plan_parts(domain(str(b)))[0]) != leaf_digest(first)


def test_what_is_appended_leaves_the_digests_of_earlier_parts(tmp_path: Path) -> None:
    path = lines(tmp_path, "a.jsonl", 0, 4000)
    before = [leaf_digest(p) for p in plan_parts(domain(str(path), part_bytes=2**16))]
    lines(tmp_path, "a.jsonl", 0, 8000)
    after = [leaf_digest(p) for p in plan_parts(domain(str(path), part_bytes=2**16))]
    assert len(after) > len(before)
    assert after[: len(before) - 1] == before[:-1]


def test_digests_of_large_files_are_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("qlora_dist.data.sources.REMEMBERED_BYTES", 100)
    path = lines(tmp_path, "a.jsonl", 0, 50)
    [part] = plan_parts(domain(str(path)))
    first = leaf_digest(part)
    assert leaf_digest(part) == first
    assert len(list((tmp_path / "cache").rglob("*"))) == 3
    size = path.stat().st_size
    path.write_bytes(b"y" * size)
    os.utime(path, ns=(1, 1))
    assert leaf_digest(part) != first


def test_a_cache_that_cant_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("qlora_dist.data.sources.REMEMBERED_BYTES", 100)
    [part] = plan_parts(domain(str(lines(tmp_path, "a.jsonl", 0, 50))))
    assert leaf_digest(part) == leaf_digest(part)


@pytest.mark.parametrize("pattern", ["", "*/*.jsonl", "**/*.jsonl", "[ab]/part.jsonl"])
def test_files_of_one_name_are_told_apart_in_records_and_rejects(tmp_path: Path, pattern: str) -> None:
    for folder in ("a", "b"):
        lines(tmp_path / folder, "part.jsonl", 0, 2).open("a").write("{broken\n")
    config = domain(str(tmp_path / pattern))
    names = set()
    for piece in (Piece.parse(text) for part in plan_parts(config) for text in part):
        for item in read_piece(piece, config.sources[0]):
            names.add((item.file, item.line) if isinstance(item, Reject) else item[:2])
    assert names == {(f"{folder}/part.jsonl", line) for folder in "ab" for line in (1, 2, 3)}


def test_a_field_that_no_kind_has_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl", 0, 2)
    config = DomainConfig(sources=[SourceConfig(path=str(tmp_path), fields={"respons": "answer_text"})])
    with pytest.raises(ConfigError, match=r"sources\[0\]\.fields=respons.*Did you mean response"):
        plan_parts(config)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{tmp}/nowhere", "domain.sources[0].path={tmp}/nowhere: expected a file, a folder, a glob or a hub id"),
        ("{tmp}/*.jsonl", "Nothing there."),
        ("{tmp}/only.pdf", ".jsonl .ndjson .json .parquet .csv .tsv .txt .md"),
        ("installed:licences", "Did you mean licenses?"),
        ("someone/something", "sources[0].revision"),
    ],
)
def test_a_source_that_names_nothing_is_refused_when_planning(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "only.pdf").write_bytes(b"%PDF")
    with pytest.raises(ConfigError) as caught:
        plan_parts(domain(path.format(tmp=tmp_path)))
    assert says.format(tmp=tmp_path) in str(caught.value)


def test_an_empty_source_is_refused_when_planning(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="empty"):
        plan_parts(domain(str(tmp_path)))


def test_a_file_name_that_is_no_utf8_is_refused_when_planning(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="names in UTF-8"):
        plan_parts(domain(str(tmp_path)))


def test_hub_datasets_are_known_by_the_commit_that_is_pinned() -> None:
    plan = {r: leaf_digest(plan_parts(domain("some/set", revision=r))[0]) for r in ("a" * 40, "b" * 40)}
    assert plan["a" * 40] != plan["b" * 40]
    for branch in ("", "main", "refs/convert/parquet"):
        with pytest.raises(ConfigError, match="commit sha"):
            plan_parts(domain("some/set", revision=branch))


@pytest.mark.parametrize(
    ("name", "least"),
    [("licenses", 50), pytest.param("docstrings", 5000, marks=pytest.mark.slow), ("reference", 70)],
)
def test_installed_corpora_are_there_and_always_the_same(name: str, least: int) -> None:
    examples = list(installed.CORPORA[name]())
    assert len(examples) >= least
    assert len({json.dumps(raw) for _, _, raw in examples}) > 0.95 * len(examples)
    assert installed.corpus_digest(name) == installed.corpus_digest(name)
    if name != "docstrings":
        assert [raw for _, _, raw in installed.CORPORA[name]()] == [raw for _, _, raw in examples]
