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

from qlora_dist.config.data import SplitConfig
from qlora_dist.config.stages import SplitsConfig
from qlora_dist.data.blocks import Block, blocks_of, join_files
from qlora_dist.data.decide import LEFT_OUT, SPLITS, Decisions, decide, fill_held_out
from qlora_dist.data.formats import UNREADABLE
from qlora_dist.data.integrity import check_splits
from qlora_dist.data.kinds import UNKNOWN
from qlora_dist.data.overlap import Overlap
from qlora_dist.data.record import Record, Reject, parse_record
from qlora_dist.data.records import RECORDS, REJECTS, read_counts
from qlora_dist.data.signatures import Index
from qlora_dist.data.workers import Workers
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts, Progress

SHOWN_REJECTS = 5
CONTAMINATION_WORDS = 13
"""As in the GPT-3 paper (Brown et al. 2020, appendix C)."""

LICENCE, OTHER_LICENCES = "licence ", "licence (others)"
MOST_LICENCES = 50
Counts = dict[str, Counter[str]]
"""By split, and under `left_out` by reason: how many."""


def write_splits(config: SplitsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` without copies, and `rejects.jsonl` with the rest.

    Memory holds blocks of the corpus, one a core, and never the whole of anything; the same bytes come out for any
    number of cores. What was written is read again and checked (`integrity.check_splits`).

    Raises:
        DataError: if too many examples were broken, too few records are left to divide, or a check fails.
    """
    parts = [inputs[f"records-{i}"] for i in range(len(inputs))]
    facts = check_rejects(config.domain, parts, config.max_reject_share)
    index = Index(parts)
    if not len(index):
        reasons = ", ".join(f"{reason} {n}" for reason, n in facts["reasons"].items()) or "the sources are empty"
        raise DataError(f"domain {config.domain}: no record is left ({reasons}).")
    scratch, steps = out / "scratch", Progress(4, unit="step")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with Workers() as workers:
        decisions = decide(index, config.split, scratch / "copies", workers)
        fill_held_out(config.domain, config.split, decisions)
        steps.update(1)
        dealer = Dealer(config.split, decisions, blocks_of([part / RECORDS for part in parts]), scratch)
        counts = dealer.write(out, workers, steps)
        shutil.rmtree(scratch)
        facts |= counts | {"integrity": check_splits(out, config.split.near_threshold, workers)}
        steps.update(4)
    return facts


def check_rejects(domain: str, parts: Sequence[Path], max_share: float) -> Facts:
    """Adds up the counts of all parts.

    Raises:
        DataError: if more than `max_share` of all examples can't be used; it lists the first of them.
    """
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    replaced: Counter[str] = Counter()
    for part in parts:
        counts = read_counts(part)
        for name, counter in (("reasons", reasons), ("kinds", kinds), ("replaced", replaced)):
            counter.update(counts[name])
        total.update({name: counts[name] for name in ("kept", "broken", "dropped", "bytes")})
    examples = total["kept"] + total["broken"] + total["dropped"]
    if reasons[UNREADABLE] and max_share < 1:
        shown = "".join(f"\n  {reject}" for reject in _first_broken(parts, UNREADABLE))
        raise DataError(f"domain {domain}: files that can't be read to their end:{shown}\nMend them or leave them out.")
    if total["broken"] > max_share * examples:
        share = total["broken"] / examples
        shown = "".join(f"\n  {reject}" for reject in _first_broken(parts))
        repair = f"Mend the files, or set max_reject_share of domain {domain} above {share:.3g}."
        if reasons[UNKNOWN]:
            repair += f" Columns of other names: domain.{domain}.sources[N].fields={{response: COLUMN}}."
        raise DataError(
            f"domain {domain}: {total['broken']} of {examples} examples can't be used, more than "
            f"max_reject_share={max_share:g}. The first:{shown}\n{repair}"
        )
    found = {"kinds": kinds, "reasons": reasons, "replaced": replaced}
    return {**total, **{name: dict(sorted(counter.items())) for name, counter in found.items()}}


@dataclass(frozen=True, slots=True)
class Dealer:
    """Writes each block of records to the splits as it was decided, then takes contaminated ones out of training."""

    config: SplitConfig
    decisions: Decisions
    blocks: Sequence[Block]
    folder: Path

    def write(self, out: Path, workers: Workers, steps: Progress) -> Facts:
        """Writes the splits and the rejects, and returns their counts."""
        counts: Counts = {name: Counter() for name in (*SPLITS, "left_out")}
        dealt = list(workers.map(self._deal, self.blocks))
        for name, found in (item for more in dealt for item in more.items()):
            _add(counts[name], found)
        for name in ("validation", "test"):
            join_files([self._path(name, block) for block in self.blocks], out / f"{name}.jsonl")
        steps.update(2)
        trained = [self._block(block, more["train"]["records"]) for block, more in zip(self.blocks, dealt, strict=True)]
        held_out = blocks_of([out / "test.jsonl", out / "validation.jsonl"])
        overlap = Overlap(
            held_out, trained, Record.prompts_and_answers, CONTAMINATION_WORDS, self.folder / "contamination"
        )
        tasks = [(block, matches, held_out) for block, matches in zip(trained, overlap.find(workers), strict=True)]
        contaminated = 0
        for num, dropped in workers.map(self._drop, tasks):
            contaminated += num
            _add(counts["train"], dropped, sign=-1)
            counts["left_out"].update({"contaminated": dropped["records"]} if dropped else {})
        join_files([self._path("train", block) for block in self.blocks], out / "train.jsonl")
        join_files([self._path("rejects", block) for block in self.blocks], out / REJECTS)
        steps.update(3)
        splits = {name: dict(sorted((+counts[name]).items())) for name in SPLITS}
        return {"splits": splits, "left_out": dict(sorted(counts["left_out"].items())), "contaminated": contaminated}

    def _path(self, name: str, block: Block) -> Path:
        return self.folder / f"{name}-{block.number}"

    def _block(self, block: Block, num: int) -> Block:
        path = self._path("train", block)
        return Block(block.number, path, 0, path.stat().st_size, 0, num)

    def _deal(self, block: Block) -> Counts:
        """Writes the records of a block to a file for each split and one for rejects."""
        counts: Counts = {name: Counter() for name in (*SPLITS, "left_out")}
        made = self.decisions.made.read(block.first, block.num)
        heads = self.decisions.heads.read(block.first, block.num)
        is_copy = made["copy_of"] >= 0
        originals = self.decisions.heads.get(made["copy_of"][is_copy])
        original = dict(zip(np.flatnonzero(is_copy).tolist(), originals, strict=True))
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(self._path(name, block).open("w", encoding="utf-8"))
                for name in (*SPLITS, "rejects")
            }
            for i, line in enumerate(block.lines()):
                record = parse_record(line)
                if i in original or made["split"][i] == LEFT_OUT:
                    reason = _copy(heads[i], original[i]) if i in original else _joined_by(record)
                    counts["left_out"][reason[0]] += 1
                    files["rejects"].write(_reject(record, *reason).to_line())
                    continue
                name = SPLITS[made["split"][i]]
                record.cluster = f"{made['cluster'][i]:016x}"
                counts[name].update(_counted(record))
                files[name].write(record.to_line())
        return counts

    def _drop(self, task: tuple[Block, np.ndarray, Sequence[Block]]) -> tuple[int, Counter[str]]:
        """Takes contaminated records out of a block's training records; returns how many are, and what was dropped."""
        block, matches, held_out = task
        matches = matches[matches["contained"] >= self.config.contamination_share]
        dropped: Counter[str] = Counter()
        if not len(matches) or not self.config.drop_contaminated:
            return len(matches), dropped
        found = {int(match["line"]): match for match in matches}
        aside = block.path.with_name(f"{block.path.name}.aside")
        with aside.open("wb") as kept, self._path("rejects", block).open("a", encoding="utf-8") as rejects:
            for i, line in enumerate(block.lines()):
                if i not in found:
                    kept.write(line)
                    continue
                record, match = parse_record(line), found[i]
                other = parse_record(held_out[match["block"]].line_at(match["offset"]))
                dropped.update(_counted(record))
                reason = f"holds {match['contained']:.0%} of held-out {other.id}"
                rejects.write(_reject(record, "contaminated", reason).to_line())
        aside.replace(block.path)
        return len(matches), dropped


def _counted(record: Record) -> dict[str, int]:
    counts = {"records": 1, "bytes": sum(len(part.encode()) for part in record.parts()), f"source {record.source}": 1}
    return counts | ({LICENCE + record.licence: 1} if record.licence else {})


def _add(counts: Counter[str], more: Mapping[str, int], sign: int = 1) -> None:
    """Adds counts up; of licences that every record names anew, only the first are counted by name."""
    for name, num in more.items():
        is_new = name.startswith(LICENCE) and name not in counts
        if is_new and sum(known.startswith(LICENCE) for known in counts) >= MOST_LICENCES:
            counts[OTHER_LICENCES] += sign * num
        else:
            counts[name] += sign * num


def _copy(head: np.ndarray, original: np.ndarray) -> tuple[str, str]:
    is_exact = head["words"] == original["words"]
    return "exact copy" if is_exact else "near copy", f"of {original['id']:016x}"


def _joined_by(record: Record) -> tuple[str, str]:
    return "kin of a held-out source", f"{record.kind}: near, or on one context"


def _reject(record: Record, reason: str, detail: str) -> Reject:
    return Reject(file=record.file, line=record.line, reason=reason, detail=detail, broken=False)


def _first_broken(parts: Sequence[Path], reason: str = "") -> Iterator[Reject]:
    shown = 0
    for part in parts:
        with (part / REJECTS).open(encoding="utf-8") as lines:
            for reject in (Reject(**json.loads(line)) for line in lines):
                if reject.broken and reason in ("", reject.reason) and shown < SHOWN_REJECTS:
                    shown += 1
                    yield reject
