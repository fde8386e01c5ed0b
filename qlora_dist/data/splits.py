"""Stage `splits`: copies are dropped over all parts of a domain, and records dealt to train, validation and test."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_dist.config.data import Deduplicate, SplitConfig
from qlora_dist.config.stages import SplitsConfig
from qlora_dist.data.contamination import HeldOutRuns, Match
from qlora_dist.data.formats import UNREADABLE
from qlora_dist.data.integrity import check_splits
from qlora_dist.data.near import clusters, exact_copies, near_copies
from qlora_dist.data.record import Record, Reject, in_batches, parse_record
from qlora_dist.data.records import RECORDS, REJECTS, read_counts
from qlora_dist.data.signatures import Index
from qlora_dist.data.words import places
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts

SPLITS = ("train", "validation", "test")
SHOWN_REJECTS = 5


@dataclass(frozen=True, slots=True)
class Decisions:
    """What becomes of each record [N]: its split's number, the record it is a copy of (-1: none), its cluster's id."""

    split: np.ndarray
    copy_of: np.ndarray
    cluster: np.ndarray


def write_splits(config: SplitsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` without copies, and `rejects.jsonl` with the rest.

    Memory holds a batch of records and some 80 bytes a record. What was written is read again and checked
    (`integrity.check_splits`).

    Raises:
        DataError: if too many examples were broken, too few records are left to divide, or a check fails.
    """
    parts = [inputs[f"records-{i}"] for i in range(len(inputs))]
    facts = check_rejects(config.domain, parts, config.max_reject_share)
    index = Index(parts)
    if not len(index):
        reasons = ", ".join(f"{reason} {n}" for reason, n in facts["reasons"].items()) or "the sources are empty"
        raise DataError(f"domain {config.domain}: no record is left ({reasons}).")
    decisions = decide(index, config.split, out / "scratch")
    decisions = _fill_held_out(config, decisions)
    counts = _write(config.split, parts, index, decisions, out)
    index.close()
    return facts | counts | {"integrity": check_splits(out, config.split.near_threshold)}


def check_rejects(domain: str, parts: Sequence[Path], max_share: float) -> Facts:
    """Adds up the counts of all parts.

    Raises:
        DataError: if more than `max_share` of all examples can't be used; it lists the first of them.
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
    if reasons[UNREADABLE] and max_share < 1:
        shown = "".join(f"\n  {reject}" for reject in _first_broken(parts, UNREADABLE))
        raise DataError(f"domain {domain}: files that can't be read to their end:{shown}\nMend them or leave them out.")
    if total["broken"] > max_share * examples:
        share = total["broken"] / examples
        shown = "".join(f"\n  {reject}" for reject in _first_broken(parts))
        repair = f"Mend the files, or set max_reject_share of domain {domain} above {share:.3g}."
        raise DataError(
            f"domain {domain}: {total['broken']} of {examples} examples can't be used, more than "
            f"max_reject_share={max_share:g}. The first:{shown}\n{repair}"
        )
    return {**total, "kinds": dict(sorted(kinds.items())), "reasons": dict(sorted(reasons.items()))}


def decide(index: Index, config: SplitConfig, scratch: Path) -> Decisions:
    """Decides about all records by their index entries alone.

    With near-copies dropped, each kept record is a cluster of its own, or all records on one context are. Where
    near-copies stay, what they link is a cluster. A cluster goes to one split as a whole.
    """
    exact = exact_copies(index.words)
    if config.deduplicate is Deduplicate.near:
        copy_of = near_copies(index, exact, config.near_threshold, scratch)
        leader = np.arange(len(index))
    else:
        copy_of = exact if config.deduplicate is Deduplicate.exact else np.full(len(index), -1)
        leader = clusters(index, exact, config.near_threshold, scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    cluster = np.where(index.contexts > 0, index.contexts, index.ids)[leader]
    place = places(cluster, "split")
    is_held_out = place < config.test_share + config.validation_share
    split = np.where(place < config.test_share, 2, np.where(is_held_out, 1, 0))
    return Decisions(split, copy_of, cluster)


def _fill_held_out(config: SplitsConfig, decisions: Decisions) -> Decisions:
    """Gives a held-out set that chance left empty the cluster that was drawn closest to it.

    Raises:
        DataError: if there are too few clusters.
    """
    split = decisions.split.copy()
    shares = {2: config.split.test_share, 1: config.split.validation_share}
    kept = decisions.copy_of < 0
    for number in [n for n, share in shares.items() if share and not (kept & (split == n)).any()]:
        train = np.unique(decisions.cluster[kept & (split == 0)])
        if len(train) < 2:
            repair = f"Add records, or set {SPLITS[number]}_share=0."
            found = len(np.unique(decisions.cluster[kept]))
            raise DataError(f"domain {config.domain}: {found} distinct records can't be divided. {repair}")
        closest = train[np.argmin(places(train, "split"))]
        split[decisions.cluster == closest] = number
    return Decisions(split, decisions.copy_of, decisions.cluster)


def _held_out_runs(parts: Sequence[Path], decisions: Decisions) -> HeldOutRuns:
    runs = HeldOutRuns()
    is_held_out = (decisions.copy_of < 0) & (decisions.split > 0)
    for i, line in enumerate(_lines(parts)):
        if is_held_out[i]:
            record = parse_record(line)
            runs.add(record.id, record.prompts_and_answers())
    runs.finish()
    return runs


def _write(config: SplitConfig, parts: Sequence[Path], index: Index, decisions: Decisions, out: Path) -> Facts:
    runs = _held_out_runs(parts, decisions)
    counts = {name: Counter[str]() for name in SPLITS}
    left_out: Counter[str] = Counter()
    contaminated, number = 0, 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((out / f"{name}.jsonl").open("w", encoding="utf-8")) for name in SPLITS}
        rejects = stack.enter_context((out / REJECTS).open("w", encoding="utf-8"))
        for batch in in_batches(map(parse_record, _lines(parts))):
            for record, match in zip(batch, runs.matches([r.prompts_and_answers() for r in batch]), strict=True):
                name = SPLITS[decisions.split[number]]
                reason = _copy(index, decisions, number)
                if not reason and name == "train" and match and match.contained >= config.contamination_share:
                    contaminated += 1
                    reason = _contaminated(match) if config.drop_contaminated else None
                if reason:
                    left_out[reason[0]] += 1
                    reject = Reject(
                        file=record.file, line=record.line, reason=reason[0], detail=reason[1], broken=False
                    )
                    rejects.write(reject.to_line())
                else:
                    record.cluster = f"{decisions.cluster[number]:016x}"
                    _count(counts[name], record)
                    files[name].write(record.to_line())
                number += 1
    splits = {name: dict(sorted(counts[name].items())) for name in SPLITS}
    return {"splits": splits, "left_out": dict(sorted(left_out.items())), "contaminated": contaminated}


def _count(counts: Counter[str], record: Record) -> None:
    counts["records"] += 1
    counts["bytes"] += sum(len(part.encode()) for part in record.parts())
    counts[f"source {record.source}"] += 1
    if record.licence:
        counts[f"licence {record.licence}"] += 1


def _copy(index: Index, decisions: Decisions, number: int) -> tuple[str, str] | None:
    original = int(decisions.copy_of[number])
    if original < 0:
        return None
    is_exact = index.words[number] == index.words[original]
    return "exact copy" if is_exact else "near copy", f"of {index.ids[original]:016x}"


def _contaminated(match: Match) -> tuple[str, str]:
    return "contaminated", f"holds {match.contained:.0%} of held-out {match.held_out}"


def _first_broken(parts: Sequence[Path], reason: str = "") -> Iterator[Reject]:
    shown = 0
    for part in parts:
        with (part / REJECTS).open(encoding="utf-8") as lines:
            for reject in (Reject(**json.loads(line)) for line in lines):
                if reject.broken and reason in ("", reject.reason) and shown < SHOWN_REJECTS:
                    shown += 1
                    yield reject


def _lines(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        with (part / RECORDS).open("rb") as lines:
            yield from lines
