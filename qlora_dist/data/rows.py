"""Packed rows on disk, read by memory map; and the order in which an epoch takes them.

B rows, T slots of a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.data.pack_rows import SEGMENT, write_rows
from qlora_dist.errors import DataError

__all__ = ["SEGMENT", "Batch", "Rows", "row_order", "write_rows"]
ARRAYS = ("tokens", "trained", "segments")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows as arrays [B, T]: tokens, targets, segment numbers (1 … in a row, 0: padding), positions."""

    tokens_BT: np.ndarray
    trained_BT: np.ndarray
    segment_BT: np.ndarray
    position_BT: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Packed rows, memory-mapped: only what is asked for is read.

    Attributes:
        tokens_BT: token ids of all rows, uint32.
        trained_BT: which slots are targets.
        segments: the table of segments (see `pack_rows.SEGMENT`), sorted by row and start.
        silent_ids: ids of special tokens, which stand for no bytes of a record.
    """

    folder: Path
    row_tokens: int
    num_rows: int
    vocab_size: int
    end_id: int
    start_id: int
    pad_id: int
    silent_ids: list[int]
    tokens_BT: np.ndarray
    trained_BT: np.ndarray
    segments: np.ndarray
    tokenizer_sha256: str = ""

    @classmethod
    def open(cls, folder: Path) -> Rows:
        """Opens the folder that `write_rows` made.

        Raises:
            DataError: if the folder holds no rows, or torn ones.
        """
        try:
            told = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
            tokens, trained, segments = (_array(folder / f"{name}.npy", told["num_rows"]) for name in ARRAYS)
            rows = cls(folder=folder, tokens_BT=tokens, trained_BT=trained, segments=segments, **told)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: no packed rows that can be read ({error}). Make them again.") from error
        if not tokens.shape == trained.shape == (rows.num_rows, rows.row_tokens):
            raise DataError(f"{folder}: arrays of shape {tokens.shape} and {trained.shape}, not as rows.json says.")
        return rows

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What is known of each record (id, cluster, source, licence), by the number that segments name."""
        with (self.folder / "records.jsonl").open("rb") as lines:
            return [json.loads(line) for line in lines]

    @cached_property
    def _first_segment(self) -> np.ndarray:
        return np.searchsorted(self.segments["row"], np.arange(self.num_rows + 1))

    def segments_of(self, row: int) -> np.ndarray:
        """Returns the segments of one row, in order."""
        return np.asarray(self.segments[self._first_segment[row] : self._first_segment[row + 1]])

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the rows of these numbers; positions start again at 0 in each segment and in the padding."""
        rows = np.asarray(indices, dtype=np.int64)
        segment_BT = np.zeros((len(rows), self.row_tokens), dtype=np.int32)
        position_BT = np.zeros((len(rows), self.row_tokens), dtype=np.int64)
        for b, row in enumerate(rows):
            segments = self.segments_of(int(row))
            lengths = segments["length"].astype(np.int64)
            used = int(lengths.sum())
            starts = np.append(np.cumsum(lengths) - lengths, used)
            lengths = np.append(lengths, self.row_tokens - used)
            segment_BT[b] = np.repeat(np.append(np.arange(1, len(lengths)), 0), lengths)
            position_BT[b] = np.arange(self.row_tokens) - np.repeat(starts, lengths)
        return Batch(self.tokens_BT[rows].astype(np.int64), np.array(self.trained_BT[rows]), segment_BT, position_BT)


def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of rows in an epoch: a permutation [num_rows] that depends on its arguments alone.

    Philox counters (Salmon et al. 2011) give the same numbers on every machine.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def _array(path: Path, num_rows: int) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r" if num_rows else None)
    return array
