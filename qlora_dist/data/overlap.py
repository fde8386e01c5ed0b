"""Texts that hold much of a held-out text are found by the runs of words that they share, joined bucket by bucket.

A join on disk: the runs of all held-out texts, and those of the others that may be among them (a Bloom filter of one
hash tells), are dealt to buckets by their hash; each bucket is joined in memory, and what a pair of texts shares in all
buckets is added up. Memory holds a bucket, a block of text and the filter (at most 32 MiB), whatever the size of the
corpus. G runs, P pairs, N records.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from qlora_dist.data.blocks import Block
from qlora_dist.data.disk import BucketWriter, bucket_of, buckets_for, read_bucket, read_buckets
from qlora_dist.data.record import Record, in_batches, parse_record
from qlora_dist.data.words import WordHashes
from qlora_dist.data.workers import Workers

MAX_OWNERS = 10
"""A run in more held-out texts than this is boilerplate, and tells nothing (the GPT-3 paper has 10, too)."""

FLOOR = 0.25
"""Less than this share of a held-out text is no match."""

MOST_FILTER_BITS = 2**28
BITS_A_RUN = 16
BYTES_A_RUN = 6
"""A word and the space after it, about: only the sizes of buckets and of the filter depend on it."""

ADDED_AT_ONCE = 2**19
BLOCK_BIT, OFFSET_BIT, TEXTS = np.uint64(48), np.uint64(16), 2**16
HELD = np.dtype([("run", "<u8"), ("text", "<u8"), ("size", "<u4")])
"""A run of a held-out text. `text` is its block, the byte in the block where its record starts, and its number there;
`size` is how many runs of it are kept."""

OTHER = np.dtype([("run", "<u8"), ("owner", "<u8")])
PAIR = np.dtype([("owner", "<u8"), ("text", "<u8"), ("size", "<u4"), ("shared", "<u4")])
MATCH = np.dtype([("line", "<i8"), ("block", "<i4"), ("offset", "<i8"), ("contained", "<f8")])
"""Line `line` of a block holds the share `contained` of a text of the held-out record that starts at byte `offset` of
held-out block `block`."""

Texts = Callable[[Record], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Finds for each record of `others` the held-out text that it holds most of.

    `texts` says which texts of a record count. With `most_runs`, each held-out text keeps as many of its runs, those
    with the smallest hashes (a bottom-k sketch, Cohen and Kaplan 2007): shares of longer texts are estimates then.
    """

    held_out: Sequence[Block]
    others: Sequence[Block]
    texts: Texts
    run_words: int
    folder: Path
    most_runs: int = 0

    def find(self, workers: Workers) -> Iterator[np.ndarray]:
        """Yields the matches of each block of `others`, one a record at most, in order of lines."""
        self.folder.mkdir(parents=True)
        num_bytes = sum(block.end - block.start for block in self.held_out)
        num_buckets = buckets_for(num_bytes // BYTES_A_RUN)
        held = self._dealt(self._deal_held, self.held_out, num_buckets, workers)
        num_bits = _filter_bits(num_bytes // BYTES_A_RUN)
        with self._filter.open("wb") as file:
            file.truncate(num_bits // 8)
        tasks = [(held, bucket, num_buckets, num_bits) for bucket in range(num_buckets)]
        for _ in workers.map(self._telling, tasks):
            pass
        _remove(held)
        others = self._dealt(self._deal_others, self.others, num_buckets, workers)
        shared = [(others, bucket, num_buckets) for bucket in range(num_buckets)]
        pairs: list[Path] = list(chain.from_iterable(workers.map(self._join, shared)))
        _remove(others)
        yield from workers.map(self._best, [(pairs, i) for i in range(len(self.others))])
        shutil.rmtree(self.folder)

    @property
    def _filter(self) -> Path:
        return self.folder / "filter"

    def _dealt(
        self, deal: Callable[[tuple[int, int]], list[Path]], blocks: Sequence[Block], num: int, workers: Workers
    ) -> list[Path]:
        return list(chain.from_iterable(workers.map(deal, [(i, num) for i in range(len(blocks))])))

    def _deal_held(self, task: tuple[int, int]) -> list[Path]:
        """Writes the distinct runs of each text of a held-out block; texts shorter than a run have none."""
        number, num_buckets = task
        writer = BucketWriter(self.folder / f"held-{number}", HELD, num_buckets)
        for at, line in self.held_out[number].offsets():
            texts = self.texts(parse_record(line))[:TEXTS]
            runs, text = WordHashes(texts).runs(self.run_words)
            for i in range(len(texts)):
                own = np.unique(runs[text == i])
                own = own[: self.most_runs or len(own)]
                entries = np.zeros(len(own), dtype=HELD)
                entries["run"], entries["size"] = own, len(own)
                entries["text"] = number << int(BLOCK_BIT) | at << int(OFFSET_BIT) | i
                writer.add(entries, bucket_of(own, num_buckets))
        return writer.close()

    def _telling(self, task: tuple[list[Path], int, int, int]) -> None:
        """Sorts a bucket of held-out runs, drops boilerplate, and writes its piece of the filter."""
        paths, bucket, num_buckets, num_bits = task
        held = read_bucket(paths, bucket, num_buckets, HELD)
        held = held[np.argsort(held["run"], kind="stable")]
        _, inverse, counts = np.unique(held["run"], return_inverse=True, return_counts=True)
        held = held[counts[inverse] <= MAX_OWNERS] if len(held) else held
        np.save(self.folder / f"telling-{bucket}.npy", held)
        size = num_bits // num_buckets
        bits = np.zeros(size, dtype=bool)
        bits[(_address(held["run"], num_bits) & np.uint64(size - 1)).astype(np.int64)] = True
        with self._filter.open("r+b") as file:
            file.seek(bucket * size // 8)
            file.write(np.packbits(bits, bitorder="little").tobytes())

    def _deal_others(self, task: tuple[int, int]) -> list[Path]:
        """Writes the distinct runs of each record of a block that the filter lets through."""
        number, num_buckets = task
        block = self.others[number]
        writer = BucketWriter(self.folder / f"others-{number}", OTHER, num_buckets)
        bits = np.memmap(self._filter, dtype=np.uint8, mode="r")
        line = 0
        for batch in in_batches(map(parse_record, block.lines())):
            texts = [self.texts(record) for record in batch]
            owner_T = np.repeat(np.arange(line, line + len(batch)), [len(t) for t in texts]).astype(np.uint64)
            run_G, text_G = WordHashes(list(chain.from_iterable(texts))).runs(self.run_words)
            address = _address(run_G, 8 * len(bits))
            is_maybe = bits[address >> np.uint64(3)] >> (address & np.uint64(7)).astype(np.uint8) & 1 > 0
            entries = np.zeros(int(is_maybe.sum()), dtype=OTHER)
            entries["run"] = run_G[is_maybe]
            entries["owner"] = owner_T[text_G[is_maybe]] | np.uint64(number) << BLOCK_BIT
            entries = _distinct(entries)
            writer.add(entries, bucket_of(entries["run"], num_buckets))
            line += len(batch)
        return writer.close()

    def _join(self, task: tuple[list[Path], int, int]) -> list[Path]:
        """Counts what each pair of texts shares in one bucket; the pairs go to buckets by the owner's block."""
        paths, bucket, num_buckets = task
        held = np.load(self.folder / f"telling-{bucket}.npy")
        writer = BucketWriter(self.folder / f"pairs-{bucket}", PAIR, len(self.others))
        for entries in read_buckets(paths, bucket, num_buckets, OTHER):
            low = np.searchsorted(held["run"], entries["run"])
            num = np.searchsorted(held["run"], entries["run"], side="right") - low
            at = np.repeat(low - (np.cumsum(num) - num), num) + np.arange(num.sum())
            pairs = np.zeros(len(at), dtype=PAIR)
            pairs["owner"], pairs["shared"] = np.repeat(entries["owner"], num), 1
            pairs["text"], pairs["size"] = held["text"][at], held["size"][at]
            pairs = _added_up(pairs)
            writer.add(pairs, pairs["owner"] >> BLOCK_BIT)
        return writer.close()

    def _best(self, task: tuple[list[Path], int]) -> np.ndarray:
        """Adds up the pairs of a block over all buckets, and keeps the best match of each record; ties: the first."""
        paths, number = task
        pairs = np.zeros(0, dtype=PAIR)
        held, num = [pairs], 0
        for more in read_buckets(paths, number, len(self.others), PAIR):
            held.append(more)
            num += len(more)
            if num > max(len(pairs), ADDED_AT_ONCE):
                pairs = _added_up(np.concatenate(held))
                held, num = [pairs], 0
        pairs = _added_up(np.concatenate(held))
        contained = pairs["shared"] / np.maximum(1, pairs["size"])
        order = np.lexsort((pairs["text"], -contained, pairs["owner"]))
        order = order[contained[order] >= FLOOR]
        order = order[np.flatnonzero(np.diff(pairs["owner"][order], prepend=np.uint64(2**64 - 1)))]
        found = np.zeros(len(order), dtype=MATCH)
        text = pairs["text"][order]
        found["line"] = pairs["owner"][order] & np.uint64((1 << 48) - 1)
        found["block"] = text >> BLOCK_BIT
        found["offset"] = text >> OFFSET_BIT & np.uint64((1 << 32) - 1)
        found["contained"] = contained[order]
        return found


def _filter_bits(num_runs: int) -> int:
    return min(MOST_FILTER_BITS, max(2**16, 1 << (BITS_A_RUN * num_runs).bit_length()))


def _address(runs: np.ndarray, num_bits: int) -> np.ndarray:
    """Returns a run's place in the filter: its highest bits, so that a bucket has a piece of the filter for itself."""
    return runs >> np.uint64(64 - (num_bits.bit_length() - 1))


def _distinct(entries: np.ndarray) -> np.ndarray:
    order = np.lexsort((entries["run"], entries["owner"]))
    entries = entries[order]
    is_new = np.ones(len(entries), dtype=bool)
    is_new[1:] = (entries["owner"][1:] != entries["owner"][:-1]) | (entries["run"][1:] != entries["run"][:-1])
    return entries[is_new]


def _added_up(pairs: np.ndarray) -> np.ndarray:
    """Returns one entry for each pair of owner and text, with what they share in all."""
    pairs = pairs[np.lexsort((pairs["text"], pairs["owner"]))]
    is_new = np.ones(len(pairs), dtype=bool)
    is_new[1:] = (pairs["owner"][1:] != pairs["owner"][:-1]) | (pairs["text"][1:] != pairs["text"][:-1])
    starts = np.flatnonzero(is_new)
    summed = pairs[starts]
    if len(starts):
        summed["shared"] = np.add.reduceat(pairs["shared"], starts)
    return summed


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink()
