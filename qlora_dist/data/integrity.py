"""What the splits and shards promise is checked again from their files, by other means than they were made."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from qlora_dist.data.blocks import Block, blocks_of
from qlora_dist.data.disk import BucketWriter, bucket_of, buckets_for, read_bucket
from qlora_dist.data.overlap import Overlap
from qlora_dist.data.record import Record, parse_record
from qlora_dist.data.words import WordHashes, mix
from qlora_dist.data.workers import Workers
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts

MARGIN = 0.15
"""More than seven standard errors of such a high similarity, as estimated by 128 hashes."""

RUN_WORDS = 5
MOST_RUNS = 64
"""Of a held-out record, so many runs are looked for at first; what they point to is compared whole."""

SLACK = 0.2
"""More than three standard errors of a share as estimated by `MOST_RUNS` runs."""

MARKED = np.dtype([("mark", "<u8"), ("split", "u1"), ("block", "<u4"), ("offset", "<u8")])
SPLITS = ("train", "validation", "test")


def check_splits(folder: Path, near_threshold: float, workers: Workers) -> Facts:
    """Checks that no record, text, cluster or near-copy lies in more than one of the three splits.

    Similarity is the Jaccard index of the 5-word sequences themselves, found through an inverted index of the held-out
    records: no signatures, no bands.

    Raises:
        DataError: naming the two records.
    """
    blocks = {name: blocks_of([folder / f"{name}.jsonl"]) for name in SPLITS}
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    _check_marks(blocks, scratch, workers)
    held_out = [*blocks["test"], *blocks["validation"]]
    highest = 0.0
    for others, against in ((blocks["validation"], blocks["test"]), (blocks["train"], held_out)):
        overlap = Overlap(against, others, own_text, RUN_WORDS, scratch / "overlap", MOST_RUNS)
        tasks = [(block, found) for block, found in zip(others, overlap.find(workers), strict=True) if len(found)]
        for alike in workers.map(partial(_highest, against, near_threshold + MARGIN), tasks):
            highest = max(highest, alike)
    shutil.rmtree(scratch)
    return {"held_out_records": sum(block.num for block in held_out), "highest_similarity": round(highest, 3)}


def check_shards(train: Path, shards: list[Path], workers: Workers) -> None:
    """Checks that the shards hold each training record once, and nothing else.

    Raises:
        DataError: if they don't.
    """
    wanted, found = _lines_digest([train], workers), _lines_digest(shards, workers)
    if wanted != found:
        raise DataError(f"{train}: {wanted[0]} records went in, {found[0]} came out in the shards, or others did.")


def own_text(record: Record) -> list[str]:
    """Returns what a record says of its own, as the one text that is compared."""
    return [record.own()]


def _marks(record: Record) -> list[int]:
    """Returns what no two splits may share, as hashes: id, cluster, and the text with spaces and case set aside."""
    text = " ".join(record.whole().lower().split())
    said = (f"id {record.id}", f"cluster {record.cluster}", f"text {text}")
    return [int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "little") for s in said]


def _check_marks(blocks: dict[str, list[Block]], scratch: Path, workers: Workers) -> None:
    every = [(SPLITS.index(name), block) for name in SPLITS for block in blocks[name]]
    num_buckets = buckets_for(3 * sum(block.num for _, block in every))
    tasks = [(i, split, block, num_buckets) for i, (split, block) in enumerate(every)]
    paths: list[Path] = list(chain.from_iterable(workers.map(partial(_deal_marks, scratch), tasks)))
    buckets = [(paths, bucket, num_buckets) for bucket in range(num_buckets)]
    for shared in workers.map(_shared_mark, buckets):
        if len(shared):
            names = [f"{SPLITS[s]} {_record_at(every[b][1], at).id}" for _, s, b, at in shared.tolist()]
            raise DataError(f"Split integrity: {names[1]} and {names[0]} are the same record, text or cluster.")
    for path in paths:
        path.unlink()


def _deal_marks(scratch: Path, task: tuple[int, int, Block, int]) -> list[Path]:
    number, split, block, num_buckets = task
    writer = BucketWriter(scratch / f"marks-{number}", MARKED, num_buckets)
    for at, line in block.offsets():
        entries = np.array([(mark, split, number, at) for mark in _marks(parse_record(line))], dtype=MARKED)
        writer.add(entries, bucket_of(mix(entries["mark"]), num_buckets))
    return writer.close()


def _shared_mark(task: tuple[list[Path], int, int]) -> np.ndarray:
    """Returns two entries of one mark in different splits, or none."""
    entries = read_bucket(*task, MARKED)
    entries = entries[np.lexsort((entries["split"], entries["mark"]))]
    is_same = (entries["mark"][1:] == entries["mark"][:-1]) & (entries["split"][1:] != entries["split"][:-1])
    at = np.flatnonzero(is_same)[:1]
    return entries[at[0] : at[0] + 2] if len(at) else entries[:0]


def _highest(held_out: Sequence[Block], limit: float, task: tuple[Block, np.ndarray]) -> float:
    """Returns the highest Jaccard index of a block's records with the held-out ones that they hold most of.

    It can't be higher than the share that is held, so the others need not be compared.
    """
    block, matches = task
    by_line = {int(match["line"]): match for match in matches}
    pairs = [(line, by_line[i]) for i, line in enumerate(block.lines()) if i in by_line]
    highest = 0.0
    for line, match in sorted(pairs, key=lambda pair: -pair[1]["contained"]):
        if match["contained"] + SLACK < highest:
            break
        record, other = parse_record(line), _record_at(held_out[match["block"]], int(match["offset"]))
        a, b = (np.unique(WordHashes(own_text(r)).runs(RUN_WORDS)[0]) for r in (record, other))
        alike = len(np.intersect1d(a, b, assume_unique=True)) / max(1, len(np.union1d(a, b)))
        highest = max(highest, alike)
        if alike >= limit:
            what = f"held-out {other.id} and {block.path.stem} {record.id} are {alike:.0%} alike"
            raise DataError(f"Split integrity: {what}; they belong in one split.")
    return highest


def _record_at(block: Block, offset: int) -> Record:
    return parse_record(block.line_at(offset))


def _lines_digest(paths: list[Path], workers: Workers) -> tuple[int, int]:
    """Returns the number of lines, and a sum of their hashes that no order changes."""
    sums = list(workers.map(_block_digest, blocks_of(paths)))
    return sum(num for num, _ in sums), sum(total for _, total in sums) % 2**128


def _block_digest(block: Block) -> tuple[int, int]:
    return block.num, sum(
        int.from_bytes(hashlib.blake2b(line, digest_size=16).digest(), "little") for line in block.lines()
    )
