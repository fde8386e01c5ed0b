"""Stage `shards`: a domain's training records are dealt to shards that hold equally many tokens.

N records, K shards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qlora_dist.config.data import ShardMode
from qlora_dist.config.stages import ShardsConfig
from qlora_dist.data.encode import Encoded, Encoder
from qlora_dist.data.integrity import check_shards
from qlora_dist.data.record import Record, in_batches, read_records
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts, log

UNEVEN = 1.02
"""Above this ratio of the largest shard to the mean one, a warning is given."""

OPEN_FILES = 256


def write_shards(config: ShardsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Deals the records of `splits/train.jsonl` to `shard-0.jsonl` …, each record to one.

    Sizes are tokens where `inputs` names a `tokenizer`, else UTF-8 bytes, times the weight of the record's source.

    Raises:
        DataError: if there are fewer records, or fewer sources with `by_source`, than shards.
    """
    train = inputs["splits"] / "train.jsonl"
    encoder = Encoder(inputs["tokenizer"], config.render) if "tokenizer" in inputs else None
    size_N, group_N = _measure(train, encoder, config.shard_mode)
    if len(size_N) < config.num_shards:
        repair = f"Set domain.{config.domain}.num_shards={max(1, len(size_N))}, or add records."
        what = f"{len(size_N)} training records for {config.num_shards} shards"
        raise DataError(f"domain {config.domain}: {what}. {repair}")
    shard_N = _deal_sources(config, size_N, group_N) if config.shard_mode is ShardMode.by_source else None
    shard_N = deal(size_N, config.num_shards, group_N) if shard_N is None else shard_N
    _write(train, shard_N, config.num_shards, out)
    check_shards(train, [out / f"shard-{k}.jsonl" for k in range(config.num_shards)])
    load_K = np.bincount(shard_N, weights=size_N, minlength=config.num_shards)
    uneven = float(load_K.max() / load_K.mean())
    if uneven > UNEVEN:
        log.warning("domain %s: the largest shard is %.2f times the mean one.", config.domain, uneven)
    return {
        "records": np.bincount(shard_N, minlength=config.num_shards).tolist(),
        "tokens" if encoder else "bytes": load_K.round().astype(int).tolist(),
        "max_over_mean": round(uneven, 4),
    }


def deal(size_N: np.ndarray, num_shards: int, group_N: np.ndarray | None = None) -> np.ndarray:
    """Returns the shard of each item [N]: the largest first, each to the lightest shard (LPT, Graham 1969).

    With groups, one group is dealt after another, the largest first, so that each is spread over all shards.
    """
    group_N = np.zeros(len(size_N), dtype=np.int64) if group_N is None else group_N
    shard_N = np.zeros(len(size_N), dtype=np.int64)
    heap = [(0.0, shard) for shard in range(num_shards)]
    group_size = np.bincount(group_N, weights=size_N)
    for i in np.lexsort((np.arange(len(size_N)), -size_N, group_N, -group_size[group_N])).tolist():
        load, shard = heap[0]
        shard_N[i] = shard
        heapq.heapreplace(heap, (load + float(size_N[i]), shard))
    return shard_N


def _deal_sources(config: ShardsConfig, size_N: np.ndarray, source_N: np.ndarray) -> np.ndarray:
    num_sources = int(source_N.max()) + 1
    if num_sources < config.num_shards:
        repair = f"Set domain.{config.domain}.num_shards={num_sources}, or shard_mode=iid."
        found = f"shard_mode=by_source with {num_sources} sources for {config.num_shards} shards"
        raise DataError(f"domain {config.domain}: {found}. {repair}")
    shard_of_source = deal(np.bincount(source_N, weights=size_N), config.num_shards)
    return np.asarray(shard_of_source[source_N])


def _measure(train: Path, encoder: Encoder | None, mode: ShardMode) -> tuple[np.ndarray, np.ndarray]:
    """Returns the size of each record [N] and the number of its group [N]."""
    sizes, groups = [], []
    names: dict[tuple[object, ...], int] = {}
    for record, size in _sizes(train, encoder):
        sizes.append(size * record.weight)
        groups.append(names.setdefault(_group(record, mode), len(names)))
    return np.array(sizes, dtype=np.float64), np.array(groups, dtype=np.int64)


def _sizes(train: Path, encoder: Encoder | None) -> Iterator[tuple[Record, int]]:
    for batch in in_batches(read_records(train)):
        if encoder is None:
            yield from ((record, sum(len(part.encode()) for part in record.parts())) for record in batch)
            continue
        for record, encoded in zip(batch, encoder.encode(batch), strict=True):
            yield record, len(encoded.tokens_N) if isinstance(encoded, Encoded) else 0


def _group(record: Record, mode: ShardMode) -> tuple[object, ...]:
    if mode is ShardMode.iid:
        return ()
    if mode is ShardMode.by_source:
        return (record.source,)
    label = record.messages[-1]["content"] if record.kind == "classification" else ""
    return (record.source, record.kind, label)


def _write(train: Path, shard_N: np.ndarray, num_shards: int, out: Path) -> None:
    """Copies each line to its shard's file, in passes of at most `OPEN_FILES` shards."""
    for first in range(0, num_shards, OPEN_FILES):
        shards = range(first, min(num_shards, first + OPEN_FILES))
        files = {k: (out / f"shard-{k}.jsonl").open("wb") for k in shards}
        with train.open("rb") as lines:
            for line, shard in zip(lines, shard_N.tolist(), strict=True):
                if shard in files:
                    files[shard].write(line)
        for file in files.values():
            file.close()
