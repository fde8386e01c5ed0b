"""Stage `splits`: copies are dropped over all parts of a domain, and records dealt to train, validation and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_dist.config.data import Deduplicate, SplitConfig
from qlora_dist.config.stages import SplitsConfig
from qlora_dist.data.near import clusters, exact_copies, keep_first, near_pairs
from qlora_dist.data.record import Record, Reject, parse_record
from qlora_dist.data.records import RECORDS, REJECTS, read_counts
from qlora_dist.data.signatures import read_index
from qlora_dist.data.words import mix
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts

SPLITS = ("train", "validation", "test")


@dataclass(slots=True)
class Decisions:
    """What becomes of each record: the number of its split, and the record it is a copy of (-1: none)."""

    split: np.ndarray
    copy_of: np.ndarray
    cluster: np.ndarray


def write_splits(config: SplitsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes `train.jsonl`, `validation.jsonl`, `test.jsonl` without copies, and `rejects.jsonl` with what was left out.

    Raises:
        DataError: if too many examples were broken, or nothing is left.
    """
    parts = [inputs[f"records-{i}"] for i in range(len(inputs))]
    facts = check_rejects(config.domain, parts, config.max_reject_share)
    index = np.concatenate([read_index(part) for part in parts])
    if not len(index):
        raise DataError(f"domain {config.domain}: no record is left. Reasons: {facts['reasons'] or 'empty sources'}.")
    decisions = decide(index, config.split)
    counts: Counter[str] = Counter()
    files = {name: (out / f"{name}.jsonl").open("w", encoding="utf-8") for name in SPLITS}
    rejects = (out / REJECTS).open("w", encoding="utf-8")
    for i, record in enumerate(_all_records(parts)):
        if decisions.copy_of[i] >= 0:
            original = f"{index['id'][decisions.copy_of[i]]:016x}"
            reason = "exact copy" if index["words"][i] == index["words"][decisions.copy_of[i]] else "near copy"
            counts[reason] += 1
            reject = Reject(file=record.file, line=record.line, reason=reason, detail=f"of {original}", broken=False)
            rejects.write(reject.to_line())
            continue
        name = SPLITS[decisions.split[i]]
        record.cluster = f"{decisions.cluster[i]:016x}"
        counts[name] += 1
        counts[f"{name}_bytes"] += len(record.whole().encode())
        files[name].write(record.to_line())
    for file in (*files.values(), rejects):
        file.close()
    return facts | {"splits": dict(sorted(counts.items()))}


def check_rejects(domain: str, parts: list[Path], max_share: float) -> Facts:
    """Adds up the counts of all parts.

    Raises:
        DataError: if more than `max_share` of all examples are broken; it lists the first of them.
    """
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for part in parts:
        counts = read_counts(part)
        reasons.update(counts["reasons"])
        kinds.update(counts["kinds"])
        total.update({name: counts[name] for name in ("kept", "broken", "dropped", "bytes")})
    examples = total["kept"] + total["broken"] + total["dropped"]
    if examples and total["broken"] / examples > max_share:
        shown = "\n  ".join(str(reject) for reject in _first_broken(parts, 5))
        share = f"{total['broken']} of {examples} examples can't be used"
        repair = f"Mend the files, or set domain.{domain}.max_reject_share={total['broken'] / examples:.2g} or more."
        raise DataError(f"domain {domain}: {share}, more than max_reject_share={max_share:g}.\n  {shown}\n{repair}")
    return {**total, "kinds": dict(sorted(kinds.items())), "reasons": dict(sorted(reasons.items()))}


def decide(index: np.ndarray, config: SplitConfig) -> Decisions:
    """Decides about all records from their index entries alone."""
    num = len(index)
    first = exact_copies(index["words"])
    pairs = near_pairs(index["signature"], config.near_threshold)
    equal = np.flatnonzero(first != np.arange(num))
    pairs = np.unique(np.concatenate([pairs, np.stack([equal, first[equal]], axis=1)]), axis=0)
    copy_of = np.full(num, -1, dtype=np.int64)
    if config.deduplicate is Deduplicate.near:
        owner = keep_first(num, pairs)
        copy_of = np.where(owner == np.arange(num), -1, owner)
        leader = np.arange(num)
    else:
        leader = clusters(num, pairs)
        if config.deduplicate is Deduplicate.exact:
            copy_of = np.where(first == np.arange(num), -1, first)
    cluster = index["id"][leader]
    return Decisions(split=draw(cluster, config), copy_of=copy_of, cluster=cluster)


def draw(cluster: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Returns each cluster's split (0 train, 1 validation, 2 test): a function of its id and the shares alone."""
    place = mix(cluster) / 2.0**64
    is_test = place < config.test_share
    is_validation = ~is_test & (place < config.test_share + config.validation_share)
    return np.where(is_test, 2, np.where(is_validation, 1, 0))


def _first_broken(parts: list[Path], num: int) -> Iterator[Reject]:
    import json

    for part in parts:
        with (part / REJECTS).open(encoding="utf-8") as lines:
            for line in lines:
                reject = Reject(**json.loads(line))
                if reject.broken and num > 0:
                    num -= 1
                    yield reject


def _all_records(parts: list[Path]) -> Iterator[Record]:
    for part in parts:
        with (part / RECORDS).open("rb") as lines:
            for line in lines:
                yield parse_record(line)
