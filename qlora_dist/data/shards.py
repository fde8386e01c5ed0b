"""Stage `shards`: a domain's training records are dealt to shards that hold equally many tokens.

N records, K shards.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_dist.config.data import ShardMode
from qlora_dist.config.stages import ShardsConfig
from qlora_dist.data.encode import Encoded, Encoder
from qlora_dist.data.integrity import check_shards
from qlora_dist.data.record import Record, in_batches, read_records
from qlora_dist.data.words import place
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts, log

UNEVEN = 1.02
"""Above this ratio of the largest shard to the mean one, a warning is given."""

OPEN_FILES = 256
MEASURED_BYTES = 2**25
"""So much of a corpus is tokenized to learn its sizes: all of it up to there, then a share of each kind of records."""


def write_shards(config: ShardsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Deals the records of `splits/train.jsonl` to `shard-0.jsonl` …, each record to one.

    Sizes are tokens where `inputs` names a `tokenizer`, else UTF-8 bytes, times the weight of the record's source. Of
    large corpora a sample is tokenized: over a whole shard the error vanishes.

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
    weights, num_bytes, num_tokens = array("d"), array("q"), array("q")
    groups, types = array("q"), array("q")
    group_names: dict[tuple[object, ...], int] = {}
    type_names: dict[tuple[object, ...], int] = {}
    measured_share = MEASURED_BYTES / max(1, train.stat().st_size) if encoder else 0
    for batch in in_batches(read_records(train)):
        tokens = _tokens(batch, encoder, measured_share)
        for record in batch:
            weights.append(record.weight)
            num_bytes.append(sum(len(part.encode()) for part in record.parts()))
            num_tokens.append(tokens.get(record.id, -1))
            groups.append(group_names.setdefault(_group(record, mode), len(group_names)))
            types.append(type_names.setdefault((record.source, record.kind), len(type_names)))
    size_N = _estimated(np.array(num_bytes, dtype=np.float64), np.array(num_tokens), np.array(types))
    return size_N * np.array(weights), np.array(groups)


def _tokens(batch: list[Record], encoder: Encoder | None, share: float) -> dict[str, int]:
    """Returns the number of tokens of some of these records, by id: of a share of them, drawn by id."""
    if encoder is None:
        return {}
    chosen = [record for record in batch if place(int(record.id, 16), "measured") < share]
    found = zip(chosen, encoder.encode(chosen), strict=True)
    return {record.id: len(e.tokens_N) if isinstance(e, Encoded) else 0 for record, e in found}


def _estimated(bytes_N: np.ndarray, tokens_N: np.ndarray, type_N: np.ndarray) -> np.ndarray:
    """Returns the tokens of each record: counted, or by the tokens a byte of its source and kind; bytes if none was."""
    is_measured = tokens_N >= 0
    if not is_measured.any():
        return bytes_N
    mean = tokens_N[is_measured].sum() / max(1, bytes_N[is_measured].sum())
    tokens = np.bincount(type_N[is_measured], weights=tokens_N[is_measured], minlength=type_N.max() + 1)
    total = np.bincount(type_N[is_measured], weights=bytes_N[is_measured], minlength=type_N.max() + 1)
    ratio = np.where(total > 0, tokens / np.maximum(total, 1), mean)
    return np.where(is_measured, tokens_N, bytes_N * ratio[type_N])


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
