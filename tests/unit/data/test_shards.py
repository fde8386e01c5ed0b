"""Shards are disjoint, complete and equally large."""

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.config.data import DomainConfig, ShardMode, SourceConfig, SplitConfig
from qlora_dist.data.blocks import blocks_of
from qlora_dist.data.integrity import check_shards
from qlora_dist.data.record import read_records
from qlora_dist.data.shards import deal
from qlora_dist.data.workers import Workers
from qlora_dist.errors import DataError

from .conftest import Corpus, sentence

Make = Callable[..., Corpus]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(1, 7), st.integers(1, 4))
def test_no_shard_outweighs_another_by_more_than_one_item(sizes: list[int], num_shards: int, num_groups: int) -> None:
    size_N = np.array(sizes, dtype=np.float64)
    shard_N = deal(size_N, num_shards, np.arange(len(sizes)) % num_groups)
    load = np.bincount(shard_N, weights=size_N, minlength=num_shards)
    assert shard_N.min() >= 0
    assert shard_N.max() < num_shards
    assert load.max() - load.min() <= max(sizes)


def shards(made: Corpus) -> list[list[str]]:
    paths = sorted((made.folder / "shards").glob("shard-*.jsonl"), key=lambda p: int(p.stem.split("-")[1]))
    return [[record.id for record in read_records(path)] for path in paths]


@pytest.mark.parametrize("num_shards", [1, 3, 300])
def test_shards_hold_each_training_record_once_and_equally_many_tokens(
    corpus: Make, tokenizer: Path, num_shards: int
) -> None:
    examples = [{"text": sentence(i, 10 + i % 50)} for i in range(900)]
    made = corpus(examples, num_shards=num_shards).records().splits().shards(tokenizer)
    found = shards(made)
    assert len(found) == num_shards
    assert sorted(i for shard in found for i in shard) == sorted(r.id for r in made.read("train"))
    assert made.facts["shards"]["max_over_mean"] <= (1.02 if num_shards < 300 else 1.5)
    sizes = []
    for k in range(min(3, num_shards)):
        made.rows(tokenizer, shard=k, row_tokens=1024)
        sizes.append(made.facts[f"rows-train-{k}"]["tokens"])
    assert num_shards == 300 or max(sizes) / np.mean(sizes) <= 1.02


def test_a_corpus_of_many_blocks_needs_few_open_files(
    corpus: Make, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("qlora_dist.data.blocks.BLOCK_BYTES", 400)
    made = corpus([{"text": sentence(i)} for i in range(300)]).records()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + 40, limits[1]))
    try:
        made.splits().shards(tokenizer).rows(tokenizer, shard=0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(blocks_of([made.folder / "splits" / "train.jsonl"])) > 150


def test_strata_are_spread_over_all_shards(corpus: Make) -> None:
    examples = [{"text": f"{sentence(i)}", "label": "rare" if i % 10 == 0 else "common"} for i in range(300)]
    made = corpus(examples, num_shards=4, shard_mode=ShardMode.stratified).records().splits().shards()
    labels = {r.id: r.messages[-1]["content"] for r in made.read("train")}
    rare = [sum(labels[i] == "rare" for i in shard) for shard in shards(made)]
    assert max(rare) - min(rare) <= 1


def test_by_source_keeps_each_source_in_one_shard(tmp_path: Path) -> None:
    for s in range(5):
        lines = "".join(f'{{"text": "{sentence(1000 * s + i)}"}}\n' for i in range(20 + 10 * s))
        (tmp_path / f"{s}.jsonl").write_text(lines)
    sources = [SourceConfig(path=str(tmp_path / f"{s}.jsonl")) for s in range(5)]
    domain = DomainConfig(sources=sources, num_shards=3, shard_mode=ShardMode.by_source, split=SplitConfig())
    made = Corpus(tmp_path, domain).records().splits().shards()
    source = {r.id: r.source for r in made.read("train")}
    homes = [{source[i] for i in shard} for shard in shards(made)]
    assert sum(len(h) for h in homes) == 5
    domain.num_shards = 6
    with pytest.raises(DataError, match="by_source with 5 sources for 6 shards"):
        made.shards()


def test_more_shards_than_records_is_an_error_with_its_repair(corpus: Make) -> None:
    made = corpus([{"text": sentence(i)} for i in range(10)], num_shards=40).records().splits()
    with pytest.raises(DataError, match=r"Set domain\.law\.num_shards="):
        made.shards()


def test_the_check_of_its_own_sees_a_lost_and_a_doubled_record(corpus: Make) -> None:
    made = corpus([{"text": sentence(i)} for i in range(30)], num_shards=2).records().splits().shards()
    train, first = made.folder / "splits" / "train.jsonl", made.folder / "shards" / "shard-0.jsonl"
    paths = [first, made.folder / "shards" / "shard-1.jsonl"]
    check_shards(train, paths, Workers(1))
    lines = first.read_text().splitlines(keepends=True)
    for wrong in (lines[1:], [lines[1], *lines[1:]]):
        first.write_text("".join(wrong))
        with pytest.raises(DataError):
            check_shards(train, paths, Workers(1))
