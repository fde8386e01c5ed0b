"""What the splits and shards promise is checked again from their files, by other means than they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from qlora_dist.data.contamination import HeldOutRuns
from qlora_dist.data.record import Record, in_batches, read_records
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts

MARGIN = 0.1
"""Three standard errors of a similarity that was estimated by 128 hashes."""

RUN_WORDS = 5


def check_splits(folder: Path, near_threshold: float) -> Facts:
    """Checks that no record, text, cluster or near-copy lies in more than one of the three splits.

    Similarity is the Jaccard index of the 5-word sequences themselves, counted through an inverted index of the
    held-out records: no signatures, no buckets.

    Raises:
        DataError: naming the two records.
    """
    seen: dict[str, tuple[str, str]] = {}
    test, held_out = HeldOutRuns(RUN_WORDS), HeldOutRuns(RUN_WORDS)
    for name in ("test", "validation"):
        for record in read_records(folder / f"{name}.jsonl"):
            _check_marks(seen, record, name)
            seen |= dict.fromkeys(_marks(record), (name, record.id))
            for runs in (test, held_out) if name == "test" else (held_out,):
                runs.add(f"{name} {record.id}", [record.whole()])
    test.finish()
    held_out.finish()
    highest = 0.0
    for name, runs in (("validation", test), ("train", held_out)):
        for batch in in_batches(read_records(folder / f"{name}.jsonl")):
            matches = runs.matches([[record.whole()] for record in batch])
            for record, match in zip(batch, matches, strict=True):
                _check_marks(seen, record, name)
                if match and match.jaccard >= near_threshold + MARGIN:
                    found = f"{match.held_out} and {name} {record.id} are {match.jaccard:.0%} alike"
                    raise DataError(f"Split integrity: {found}; they belong in one split.")
                highest = max(highest, match.jaccard if match else 0.0)
    return {"held_out_records": len({record for _, record in seen.values()}), "highest_similarity": round(highest, 3)}


def check_shards(train: Path, shards: list[Path]) -> None:
    """Checks that the shards hold each training record once, and nothing else.

    Raises:
        DataError: if they don't.
    """
    wanted, found = _lines_digest([train]), _lines_digest(shards)
    if wanted != found:
        raise DataError(f"{train}: {wanted[0]} records went in, {found[0]} came out in the shards, or others did.")


def _marks(record: Record) -> Iterator[str]:
    """Yields what no two splits may share: id, cluster, and the text with spaces and case set aside."""
    yield f"id {record.id}"
    yield f"cluster {record.cluster}"
    yield "text " + hashlib.sha256(" ".join(record.whole().lower().split()).encode()).hexdigest()[:24]


def _check_marks(seen: dict[str, tuple[str, str]], record: Record, split: str) -> None:
    for mark in _marks(record):
        other, other_id = seen.get(mark, (split, ""))
        if other != split:
            what = mark.split(" ")[0]
            raise DataError(f"Split integrity: {other} {other_id} and {split} {record.id} share their {what}.")


def _lines_digest(paths: list[Path]) -> tuple[int, int]:
    """Returns the number of lines, and a sum of their hashes that no order changes."""
    total = number = 0
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                total += int.from_bytes(hashlib.blake2b(line, digest_size=16).digest(), "little")
                number += 1
    return number, total % 2**128
