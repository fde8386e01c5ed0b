"""What the splits and shards promise is checked again from their files, by other means than they were made."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path

import numpy as np

from qlora_dist.data.contamination import HeldOutRuns
from qlora_dist.data.record import Record, in_batches, read_records
from qlora_dist.data.words import WordHashes
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts

MARGIN = 0.15
"""More than seven standard errors of such a high similarity, as estimated by 128 hashes."""

RUN_WORDS = 5
NUM_MARKS = 3


def check_splits(folder: Path, near_threshold: float) -> Facts:
    """Checks that no record, text, cluster or near-copy lies in more than one of the three splits.

    Similarity is the Jaccard index of the 5-word sequences themselves, counted through an inverted index of the
    held-out records: no signatures, no buckets.

    Raises:
        DataError: naming the two records.
    """
    test, held_out = HeldOutRuns(RUN_WORDS), HeldOutRuns(RUN_WORDS)
    marks = {name: _all_marks(folder / f"{name}.jsonl") for name in ("test", "validation")}
    for name in marks:
        for record in read_records(folder / f"{name}.jsonl"):
            for runs in (test, held_out) if name == "test" else (held_out,):
                runs.add(f"{name} {record.id}", [record.own()])
    test.finish()
    held_out.finish()
    highest = 0.0
    for name, runs, others in (("validation", test, ["test"]), ("train", held_out, ["test", "validation"])):
        for batch in in_batches(read_records(folder / f"{name}.jsonl")):
            for other in others:
                _check_marks(folder, batch, name, other, marks[other])
            for record, match in zip(batch, runs.matches([[r.own()] for r in batch]), strict=True):
                highest = max(highest, match.jaccard if match else 0.0)
                if match and match.jaccard >= near_threshold + MARGIN:
                    _check_pair(folder, match.held_out, name, record, near_threshold + MARGIN)
    num_held_out = sum(len(found) for found in marks.values()) // NUM_MARKS
    return {"held_out_records": num_held_out, "highest_similarity": round(highest, 3)}


def check_shards(train: Path, shards: list[Path]) -> None:
    """Checks that the shards hold each training record once, and nothing else.

    Raises:
        DataError: if they don't.
    """
    wanted, found = _lines_digest([train]), _lines_digest(shards)
    if wanted != found:
        raise DataError(f"{train}: {wanted[0]} records went in, {found[0]} came out in the shards, or others did.")


def _marks(record: Record) -> list[int]:
    """Returns what no two splits may share, as hashes: id, cluster, and the text with spaces and case set aside."""
    text = " ".join(record.whole().lower().split())
    said = (f"id {record.id}", f"cluster {record.cluster}", f"text {text}")
    return [int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "little") for s in said]


def _all_marks(path: Path) -> np.ndarray:
    found = array("Q")
    for record in read_records(path):
        found.extend(_marks(record))
    return np.sort(np.array(found, dtype=np.uint64))


def _check_marks(folder: Path, batch: list[Record], split: str, other: str, marks: np.ndarray) -> None:
    own = np.array([_marks(record) for record in batch], dtype=np.uint64)
    if not np.isin(own, marks).any():
        return
    for record in read_records(folder / f"{other}.jsonl"):
        for row in np.flatnonzero(np.isin(own, np.array(_marks(record), dtype=np.uint64)).any(axis=1)):
            what = f"{other} {record.id} and {split} {batch[int(row)].id} are the same record, text or cluster"
            raise DataError(f"Split integrity: {what}.")


def _check_pair(folder: Path, held_out: str, split: str, record: Record, limit: float) -> None:
    """Compares two records run by run, as what pointed to them may be an estimate."""
    other, _, other_id = held_out.partition(" ")
    found = next(r for r in read_records(folder / f"{other}.jsonl") if r.id == other_id)
    a, b = (np.unique(WordHashes([r.own()]).runs(RUN_WORDS)[0]) for r in (found, record))
    alike = len(np.intersect1d(a, b)) / max(1, len(np.union1d(a, b)))
    if alike >= limit:
        what = f"{held_out} and {split} {record.id} are {alike:.0%} alike"
        raise DataError(f"Split integrity: {what}; they belong in one split.")


def _lines_digest(paths: list[Path]) -> tuple[int, int]:
    """Returns the number of lines, and a sum of their hashes that no order changes."""
    total = number = 0
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                total += int.from_bytes(hashlib.blake2b(line, digest_size=16).digest(), "little")
                number += 1
    return number, total % 2**128
