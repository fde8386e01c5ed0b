"""Stage `shards`: a domain's training records are dealt to shards that hold equally many tokens.

N records, K shards, G groups.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from qlora_dist.config.data import ShardMode
from qlora_dist.config.stages import ShardsConfig
from qlora_dist.data.blocks import Block, blocks_of
from qlora_dist.data.disk import DiskArray
from qlora_dist.data.encode import Encoded, open_encoder
from qlora_dist.data.integrity import check_shards
from qlora_dist.data.record import Record, in_batches, parse_record
from qlora_dist.data.words import place
from qlora_dist.data.workers import Workers
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts, log

UNEVEN = 1.02
"""Above this ratio of the largest shard to the mean one, a warning is given."""

MEASURED_BYTES = 2**23
"""So much of a corpus is tokenized to learn its sizes: all of it up to there, then a share of each kind of records."""

MEASURE = np.dtype([("weight", "<f8"), ("bytes", "<i8"), ("tokens", "<i8"), ("group", "<i4"), ("type", "<i4")])
"""A record's weight, its bytes, its tokens (-1: not counted), its group and its type (source and kind)."""

ITEM = np.dtype([("rank", "<i8"), ("size", "<f8"), ("number", "<i8")])
"""A record in the order of dealing: the rank of its group, its size (negative: the largest first) and its number."""

MERGED_AT_ONCE = 2**12
Names = list[tuple[object, ...]]
Item = tuple[int, float, int]


def write_shards(config: ShardsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Deals the records of `splits/train.jsonl` to `shard-0.jsonl` …, each record to one.

    Sizes are tokens where `inputs` names a `tokenizer`, else UTF-8 bytes, times the weight of the record's source. Of
    large corpora a sample is tokenized: over a whole shard the error vanishes. Memory holds a block of the corpus, one
    a core; the same bytes come out for any number of cores.

    Raises:
        DataError: if there are fewer records, or fewer sources with `by_source`, than shards.
    """
    train, scratch = inputs["splits"] / "train.jsonl", out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    blocks = blocks_of([train])
    dealer = _Dealer(config, inputs.get("tokenizer"), blocks, train.stat().st_size, scratch)
    size = sum(block.num for block in blocks)
    if size < config.num_shards:
        repair = f"Set domain.{config.domain}.num_shards={max(1, size)}, or add records."
        what = f"{size} training records for {config.num_shards} shards"
        raise DataError(f"domain {config.domain}: {what}. {repair}")
    with Workers() as workers:
        group_size_G = dealer.measure(workers)
        num_K, load_K = dealer.deal(group_size_G, workers)
        dealer.write(out, workers)
        check_shards(train, [out / f"shard-{k}.jsonl" for k in range(config.num_shards)], workers)
    shutil.rmtree(scratch)
    uneven = float(load_K.max() / load_K.mean())
    if uneven > UNEVEN:
        log.warning("domain %s: the largest shard is %.2f times the mean one.", config.domain, uneven)
    return {
        "records": num_K.tolist(),
        "tokens" if "tokenizer" in inputs else "bytes": load_K.round().astype(int).tolist(),
        "max_over_mean": round(uneven, 4),
    }


def deal(size_N: np.ndarray, num_shards: int, group_N: np.ndarray | None = None) -> np.ndarray:
    """Returns the shard of each item [N]: the largest first, each to the lightest shard (LPT, Graham 1969).

    With groups, one group is dealt after another, the largest first, so that each is spread over all shards.
    """
    group_N = np.zeros(len(size_N), dtype=np.int64) if group_N is None else group_N
    items = _in_order(size_N, _ranks(np.bincount(group_N, weights=size_N))[group_N], 0)
    shard_N = np.zeros(len(size_N), dtype=np.int64)
    for number, shard, _ in _dealt(map(tuple, items.tolist()), num_shards):
        shard_N[number] = shard
    return shard_N


def _ranks(group_size_G: np.ndarray) -> np.ndarray:
    """Returns the place of each group in the order of dealing [G]: the largest first."""
    rank_G = np.zeros(len(group_size_G), dtype=np.int64)
    rank_G[np.lexsort((np.arange(len(group_size_G)), -group_size_G))] = np.arange(len(group_size_G))
    return rank_G


def _in_order(size_N: np.ndarray, rank_N: np.ndarray, first: int) -> np.ndarray:
    """Returns items [N], numbered from `first`, in the order of dealing."""
    items = np.zeros(len(size_N), dtype=ITEM)
    items["rank"], items["size"], items["number"] = rank_N, -size_N, np.arange(first, first + len(size_N))
    return items[np.lexsort((items["number"], items["size"], items["rank"]))]


def _dealt(items: Iterable[Item], num_shards: int) -> Iterator[tuple[int, int, float]]:
    """Yields number, shard and size of each item: the lightest shard takes it."""
    heap = [(0.0, shard) for shard in range(num_shards)]
    for _, negative_size, number in items:
        load, shard = heap[0]
        heapq.heapreplace(heap, (load - negative_size, shard))
        yield number, shard, -negative_size


@dataclass(frozen=True)
class _Dealer:
    """Measures, deals and writes the records of all blocks; what is known of each record stays on disk."""

    config: ShardsConfig
    tokenizer: Path | None
    blocks: Sequence[Block]
    num_bytes: int
    folder: Path

    @property
    def _measures(self) -> DiskArray:
        return DiskArray(self.folder / "measures", MEASURE)

    @property
    def _items(self) -> DiskArray:
        return DiskArray(self.folder / "items", ITEM)

    @property
    def _shards(self) -> DiskArray:
        return DiskArray(self.folder / "shards", np.dtype("<i4"))

    def measure(self, workers: Workers) -> np.ndarray:
        """Writes the items in the order of dealing, block by block; returns the size of each group [G]."""
        num = sum(block.num for block in self.blocks)
        for array in (self._measures, self._items, self._shards):
            DiskArray.make(array.path, array.dtype, num)
        groups: dict[tuple[object, ...], int] = {}
        types: dict[tuple[object, ...], int] = {}
        for block, (own_groups, own_types) in zip(self.blocks, workers.map(self._measure, self.blocks), strict=True):
            measures = self._measures.read(block.first, block.num)
            for name, known, own in (("group", groups, own_groups), ("type", types, own_types)):
                measures[name] = np.array([known.setdefault(n, len(known)) for n in own])[measures[name]]
            self._measures.write(block.first, measures)
        ratio = self._tokens_a_byte(len(types))
        size_G = np.zeros(len(groups))
        for block in self.blocks:
            measures = self._measures.read(block.first, block.num)
            size_G += np.bincount(measures["group"], _sizes(measures, ratio), minlength=len(groups))
        for block in self.blocks:
            measures = self._measures.read(block.first, block.num)
            rank_N = _ranks(size_G)[measures["group"]]
            self._items.write(block.first, _in_order(_sizes(measures, ratio), rank_N, block.first))
        return size_G

    def deal(self, group_size_G: np.ndarray, workers: Workers) -> tuple[np.ndarray, np.ndarray]:
        """Writes the shard of each record; returns how many records [K] and tokens [K] each shard has."""
        num_shards = self.config.num_shards
        num_K, load_K = np.zeros(num_shards, dtype=np.int64), np.zeros(num_shards)
        merged: Iterator[Item] = heapq.merge(*(self._items_of(block) for block in self.blocks))
        by_source = self.config.shard_mode is ShardMode.by_source
        dealt = self._by_source(merged, group_size_G) if by_source else _dealt(merged, num_shards)
        while some := list(islice(dealt, 2**16)):
            number, shard, size = (np.array(column) for column in zip(*some, strict=True))
            self._shards.put(number, shard)
            num_K += np.bincount(shard, minlength=num_shards)
            load_K += np.bincount(shard, size, minlength=num_shards)
        return num_K, load_K

    def write(self, out: Path, workers: Workers) -> None:
        """Writes the shards: each block's lines, sorted by shard, and then what each shard has of every block."""
        for _ in workers.map(self._sort_lines, self.blocks):
            pass
        for shard in range(self.config.num_shards):
            with (out / f"shard-{shard}.jsonl").open("wb") as file:
                for block in self.blocks:
                    start, end = self._ends(block).read(shard, 2).tolist()
                    with self._sorted(block).open("rb") as lines:
                        lines.seek(start)
                        file.write(lines.read(end - start))

    def _measure(self, block: Block) -> tuple[Names, Names]:
        """Writes the measures of a block's records, and returns the names of its groups and of its types."""
        groups: dict[tuple[object, ...], int] = {}
        types: dict[tuple[object, ...], int] = {}
        found = []
        for batch in in_batches(map(parse_record, block.lines())):
            tokens = self._tokens(batch)
            for record in batch:
                group = groups.setdefault(_group(record, self.config.shard_mode), len(groups))
                kind = types.setdefault((record.source, record.kind), len(types))
                num_bytes = sum(len(part.encode()) for part in record.parts())
                found.append((record.weight, num_bytes, tokens.get(record.id, -1), group, kind))
        self._measures.write(block.first, np.array(found, dtype=MEASURE))
        return list(groups), list(types)

    def _tokens(self, batch: list[Record]) -> dict[str, int]:
        """Returns the number of tokens of some of these records, by id: of a share of them, drawn by id."""
        if self.tokenizer is None:
            return {}
        share = MEASURED_BYTES / max(1, self.num_bytes)
        chosen = [record for record in batch if place(int(record.id, 16), "measured") < share]
        found = zip(chosen, open_encoder(self.tokenizer, self.config.render).encode(chosen), strict=True)
        return {record.id: len(e.tokens_N) if isinstance(e, Encoded) else 0 for record, e in found}

    def _tokens_a_byte(self, num_types: int) -> np.ndarray | None:
        """Returns the tokens a byte of each type, by the records that were counted; None if none was."""
        tokens, num_bytes = np.zeros(num_types), np.zeros(num_types)
        for block in self.blocks:
            measures = self._measures.read(block.first, block.num)
            counted = measures[measures["tokens"] >= 0]
            tokens += np.bincount(counted["type"], counted["tokens"], minlength=num_types)
            num_bytes += np.bincount(counted["type"], counted["bytes"], minlength=num_types)
        if not num_bytes.sum():
            return None
        return np.where(num_bytes > 0, tokens / np.maximum(num_bytes, 1), tokens.sum() / num_bytes.sum())

    def _items_of(self, block: Block) -> Iterator[Item]:
        for first in range(block.first, block.first + block.num, MERGED_AT_ONCE):
            num = min(MERGED_AT_ONCE, block.first + block.num - first)
            yield from map(tuple, self._items.read(first, num).tolist())

    def _by_source(self, items: Iterable[Item], size_G: np.ndarray) -> Iterator[tuple[int, int, float]]:
        config = self.config
        if len(size_G) < config.num_shards:
            repair = f"Set domain.{config.domain}.num_shards={len(size_G)}, or shard_mode=iid."
            found = f"shard_mode=by_source with {len(size_G)} sources for {config.num_shards} shards"
            raise DataError(f"domain {config.domain}: {found}. {repair}")
        shard_of_rank = deal(size_G, config.num_shards)[np.argsort(_ranks(size_G))].tolist()
        for rank, negative_size, number in items:
            yield number, shard_of_rank[rank], -negative_size

    def _sorted(self, block: Block) -> Path:
        return self.folder / f"lines-{block.number}"

    def _ends(self, block: Block) -> DiskArray:
        """Where the lines of each shard start among a block's sorted ones, and the last ones end [K + 1]."""
        return DiskArray(self._sorted(block).with_suffix(".ends"), np.dtype("<i8"))

    def _sort_lines(self, block: Block) -> None:
        """Writes a block's lines sorted by shard, and where those of each shard start."""
        shard_N, lines = self._shards.read(block.first, block.num), list(block.lines())
        order = np.argsort(shard_N, kind="stable")
        self._sorted(block).write_bytes(b"".join([lines[i] for i in order.tolist()]))
        sizes = np.bincount(shard_N, [len(line) for line in lines], minlength=self.config.num_shards)
        ends = DiskArray.make(self._ends(block).path, "<i8", self.config.num_shards + 1)
        ends.write(1, np.cumsum(sizes.astype(np.int64)))


def _sizes(measures: np.ndarray, tokens_a_byte: np.ndarray | None) -> np.ndarray:
    """Returns the size of each record [N]: tokens, counted or by its bytes; bytes if no record's were counted."""
    size_N = measures["bytes"].astype(np.float64)
    if tokens_a_byte is not None:
        size_N = np.where(measures["tokens"] >= 0, measures["tokens"], size_N * tokens_a_byte[measures["type"]])
    return np.asarray(size_N * measures["weight"])


def _group(record: Record, mode: ShardMode) -> tuple[object, ...]:
    if mode is ShardMode.iid:
        return ()
    if mode is ShardMode.by_source:
        return (record.source,)
    label = record.messages[-1]["content"] if record.kind == "classification" else ""
    return (record.source, record.kind, label)
