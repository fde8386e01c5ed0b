"""Stage `shards`: a domain's training records are dealt to shards of equal size."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_dist.config.data import ShardMode
from qlora_dist.config.stages import ShardsConfig
from qlora_dist.data.record import read_records
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts


def write_shards(config: ShardsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Deals the records of `splits/train.jsonl` to `shard-0.jsonl` …, balanced by size.

    Raises:
        DataError: if there are fewer training records than shards.
    """
    train = inputs["splits"] / "train.jsonl"
    sizes, groups = [], []
    for record in read_records(train):
        sizes.append(len(record.whole().encode()))
        groups.append(f"{record.source}" if config.shard_mode is ShardMode.by_source else record.kind)
    if len(sizes) < config.num_shards:
        repair = f"Set domain.{config.domain}.num_shards={max(1, len(sizes))}, or add records."
        raise DataError(
            f"domain {config.domain}: {len(sizes)} training records for {config.num_shards} shards. {repair}"
        )
    shard_of = deal(np.array(sizes), config.num_shards)
    load = np.bincount(shard_of, weights=sizes, minlength=config.num_shards)
    files = [(out / f"shard-{i}.jsonl").open("wb") for i in range(config.num_shards)]
    with train.open("rb") as lines:
        for line, shard in zip(lines, shard_of.tolist(), strict=True):
            files[shard].write(line)
    for file in files:
        file.close()
    counts = np.bincount(shard_of, minlength=config.num_shards)
    return {
        "records": counts.tolist(),
        "bytes": load.astype(int).tolist(),
        "max_over_mean": round(float(load.max() / load.mean()), 4),
    }


def deal(sizes: np.ndarray, num_shards: int) -> np.ndarray:
    """Deals items to shards, the largest first, each to the lightest shard (LPT, Graham 1969)."""
    shard_of = np.zeros(len(sizes), dtype=np.int64)
    heap = [(0, shard) for shard in range(num_shards)]
    for i in np.argsort(-sizes, kind="stable").tolist():
        load, shard = heapq.heappop(heap)
        shard_of[i] = shard
        heapq.heappush(heap, (load + int(sizes[i]), shard))
    return shard_of
