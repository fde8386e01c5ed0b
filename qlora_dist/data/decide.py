"""What becomes of each record of a domain is decided by the records' index entries alone.

N records.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_dist.config.data import Deduplicate, SplitConfig
from qlora_dist.data.disk import DiskArray
from qlora_dist.data.near import CopySearch
from qlora_dist.data.signatures import USES, Index
from qlora_dist.data.words import places
from qlora_dist.data.workers import Workers
from qlora_dist.errors import DataError

SPLITS = ("train", "validation", "test")
LEFT_OUT = -1
DECISION = np.dtype([("split", "i1"), ("copy_of", "<i8"), ("cluster", "<u8")])
"""A record's split, as a number (`LEFT_OUT`: none, for the sake of a source that was set aside), the record it is a
copy of (-1: none) and its cluster's id."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """What becomes of each record, on disk; and the heads of their index entries."""

    made: DiskArray
    heads: DiskArray

    def kept(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the decisions on the records that stay, a few at a time, with the number of the first decision."""
        for first, chunk in self.made.chunks():
            yield first, chunk[(chunk["copy_of"] < 0) & (chunk["split"] != LEFT_OUT)]


def decide(index: Index, config: SplitConfig, folder: Path, workers: Workers) -> Decisions:
    """Decides about all records, with arrays in `folder`.

    With near-copies dropped, each kept record is a cluster of its own, or all records on one context are. Where
    near-copies stay, what they link is a cluster. A cluster goes to one split as a whole: by a hash of its id, or
    where a source that was set aside for a split holds one of its records; other records of that cluster are left out.
    """
    shutil.rmtree(folder, ignore_errors=True)
    search = CopySearch(index, config.near_threshold, folder)
    search.prepare(workers)
    search.drop_exact(workers)
    leaders = None
    if config.deduplicate is Deduplicate.near:
        search.drop_near(workers)
    else:
        leaders = search.leaders(workers)
    decisions = Decisions(DiskArray.make(folder / "decisions", DECISION, len(index)), search.heads)
    for first, copies in search.copy_of.chunks():
        heads = search.heads.read(first, len(copies))
        if leaders is not None:
            heads = _led(search.heads, heads, first, leaders[first : first + len(copies)])
        made = np.zeros(len(copies), dtype=DECISION)
        made["copy_of"] = -1 if config.deduplicate is Deduplicate.none else copies
        made["cluster"] = np.where(heads["context"] > 0, heads["context"], heads["id"])
        made["split"] = _split_of(made["cluster"], config)
        decisions.made.write(first, made)
    _set_aside(decisions, are_linked=leaders is not None)
    return decisions


def fill_held_out(domain: str, config: SplitConfig, decisions: Decisions) -> None:
    """Gives a held-out set that chance left empty the cluster that was drawn closest to it.

    Raises:
        DataError: if there are too few clusters.
    """
    shares = {SPLITS.index("test"): config.test_share, SPLITS.index("validation"): config.validation_share}
    for number in [n for n, share in shares.items() if share and not _has_any(decisions, n)]:
        closest, num_clusters = _closest(decisions)
        if num_clusters < 2:
            repair = f"Add records, or set {SPLITS[number]}_share=0."
            found = len(np.unique(np.concatenate([chunk["cluster"] for _, chunk in decisions.kept()])))
            raise DataError(f"domain {domain}: {found} distinct records can't be divided. {repair}")
        for first, chunk in decisions.made.chunks():
            moved = (chunk["cluster"] == closest) & (chunk["split"] != LEFT_OUT)
            if moved.any():
                chunk["split"][moved] = number
                decisions.made.write(first, chunk)


def _split_of(cluster: np.ndarray, config: SplitConfig) -> np.ndarray:
    place = places(cluster, "split")
    is_held_out = place < config.test_share + config.validation_share
    return np.where(place < config.test_share, 2, np.where(is_held_out, 1, 0))


def _led(heads: DiskArray, own: np.ndarray, first: int, leader: np.ndarray) -> np.ndarray:
    """Returns the heads of the records that lead those from number `first` on."""
    led = own.copy()
    others = np.flatnonzero(leader != np.arange(first, first + len(own)))
    led[others] = heads.get(leader[others])
    return led


def _set_aside(decisions: Decisions, *, are_linked: bool) -> None:
    """Puts records of sources that were set aside in their split, with all of their clusters.

    Records that share a cluster with a held-out source are left out, so that this set holds what people put there and
    nothing else; those that share one with a training source train. Memory holds the clusters of held-out sources, and
    of training sources those that may have other records: which share a context, or all where copies are linked.
    """
    claimed = _claimed(decisions, are_linked=are_linked)
    for first, chunk in decisions.made.chunks():
        use = decisions.heads.read(first, len(chunk))["use"]
        for name in ("train", "validation", "test"):
            number, is_own = SPLITS.index(name), use == USES.index(name)
            is_claimed = np.isin(chunk["cluster"], claimed[name])
            chunk["split"][is_own] = number
            chunk["split"][is_claimed & ~is_own] = LEFT_OUT if name != "train" else number
        decisions.made.write(first, chunk)


def _claimed(decisions: Decisions, *, are_linked: bool) -> dict[str, np.ndarray]:
    """Returns the clusters of the records that were set aside for each split; each cluster once, test before others."""
    found: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype=np.uint64)] for name in SPLITS}
    for first, chunk in decisions.made.chunks():
        heads = decisions.heads.read(first, len(chunk))
        for name in SPLITS:
            is_own = (heads["use"] == USES.index(name)) & (chunk["copy_of"] < 0)
            if name == "train" and not are_linked:
                is_own &= heads["context"] > 0
            found[name].append(chunk["cluster"][is_own])
    claimed = {name: np.unique(np.concatenate(clusters)) for name, clusters in found.items()}
    claimed["validation"] = np.setdiff1d(claimed["validation"], claimed["test"])
    held_out = np.union1d(claimed["validation"], claimed["test"])
    return claimed | {"train": np.setdiff1d(claimed["train"], held_out)}


def _has_any(decisions: Decisions, number: int) -> bool:
    return any((chunk["split"] == number).any() for _, chunk in decisions.kept())


def _closest(decisions: Decisions) -> tuple[int, int]:
    """Returns the training cluster that was drawn closest to the held-out ones, and how many there are (2: or more)."""
    closest = np.zeros(0, dtype=np.uint64)
    for first, chunk in decisions.made.chunks():
        is_free = decisions.heads.read(first, len(chunk))["use"] == 0
        is_free &= (chunk["copy_of"] < 0) & (chunk["split"] == 0)
        clusters = np.unique(np.append(closest, chunk["cluster"][is_free]))
        closest = clusters[np.argsort(places(clusters, "split"), kind="stable")[:2]]
    return (int(closest[0]) if len(closest) else 0), len(closest)
