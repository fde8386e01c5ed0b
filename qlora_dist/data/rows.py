"""Stage `rows`: records become packed rows of tokens, and `Rows` reads them.

B rows, T slots of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.config.data import LongRecords
from qlora_dist.config.stages import RowsConfig
from qlora_dist.data.encode import Encoded, Encoder
from qlora_dist.data.packing import pack
from qlora_dist.data.record import read_records
from qlora_dist.errors import DataError
from qlora_dist.runtime import Facts, write_json

SEGMENT = np.dtype([("row", "<i8"), ("start", "<i4"), ("length", "<i4"), ("record", "<i8"), ("trained_bytes", "<i8")])
"""One entry of `segments.npy`: which slots of which row belong to which record."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows as arrays [B, T]: tokens, targets, segment numbers (1 … in a row, 0: padding), positions."""

    tokens_BT: np.ndarray
    trained_BT: np.ndarray
    segment_BT: np.ndarray
    position_BT: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Packed rows, memory-mapped: only what is asked for is read."""

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
    first_segment: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Rows:
        """Opens the folder that `write_rows` made.

        Raises:
            DataError: if the folder holds no rows.
        """
        try:
            told = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
            mode = "r" if told["num_rows"] else None
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in ("tokens", "trained", "segments")
            }
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: no packed rows ({error}).") from error
        first = np.searchsorted(arrays["segments"]["row"], np.arange(told["num_rows"] + 1))
        return cls(
            folder=folder,
            tokens_BT=arrays["tokens"],
            trained_BT=arrays["trained"],
            segments=arrays["segments"],
            first_segment=first,
            **told,
        )

    def __len__(self) -> int:
        return self.num_rows

    def segments_of(self, row: int) -> np.ndarray:
        """Returns the segments of one row, in order."""
        return np.asarray(self.segments[self.first_segment[row] : self.first_segment[row + 1]])

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What is known of each record (id, cluster, source …), by the number that segments name."""
        with (self.folder / "records.jsonl").open("rb") as lines:
            return [json.loads(line) for line in lines]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the rows of these numbers, with segments and positions worked out."""
        rows = np.asarray(indices, dtype=np.int64)
        segment_BT = np.zeros((len(rows), self.row_tokens), dtype=np.int32)
        position_BT = np.zeros((len(rows), self.row_tokens), dtype=np.int64)
        for b, row in enumerate(rows):
            end = 0
            for number, segment in enumerate(self.segments_of(int(row)), start=1):
                start, length = int(segment["start"]), int(segment["length"])
                end = start + length
                segment_BT[b, start:end] = number
                position_BT[b, start:end] = np.arange(length)
            position_BT[b, end:] = np.arange(self.row_tokens - end)
        return Batch(self.tokens_BT[rows].astype(np.int64), np.asarray(self.trained_BT[rows]), segment_BT, position_BT)


def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of rows in an epoch: a permutation that depends on nothing but its arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def write_rows(config: RowsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Tokenizes the records of a split or a shard and packs them into rows of `row_tokens`.

    Raises:
        DataError: if no token would be trained, or the tokenizer knows tokens that the model has not.
    """
    encoder = Encoder(inputs["tokenizer"], config.render)
    source = inputs["shards"] / f"shard-{config.shard}.jsonl" if "shards" in inputs else None
    source = source or inputs["splits"] / f"{config.split}.jsonl"
    segments: list[tuple[np.ndarray, np.ndarray]] = []
    owners, sizes, facts = [], [], {"records": 0, "too_long": 0, "tokens": 0}
    stream = read_records(source)
    with (out / "records.jsonl").open("w", encoding="utf-8") as names:
        while records := list(islice(stream, 256)):
            for record, encoded in zip(records, encoder.encode(records), strict=True):
                cut = _cut(encoded, config, encoder.start_id, is_text=bool(record.text))
                if config.render.long_records is LongRecords.drop and len(cut) > 1:
                    facts["too_long"] += 1
                    continue
                for tokens, trained, trained_bytes in cut:
                    segments.append((tokens, trained))
                    owners.append(facts["records"])
                    sizes.append(trained_bytes)
                facts["records"] += 1
                known = {"id": record.id, "cluster": record.cluster, "source": f"{record.file}:{record.line}"}
                names.write(json.dumps(known | {"licence": record.licence}, ensure_ascii=False) + "\n")
    lengths = np.array([len(tokens) for tokens, _ in segments], dtype=np.int64)
    row_of, start_of, num_rows = pack(lengths, config.row_tokens)
    tokens_BT = np.full((num_rows, config.row_tokens), encoder.pad_id, dtype=np.uint32)
    trained_BT = np.zeros((num_rows, config.row_tokens), dtype=bool)
    table = np.zeros(len(segments), dtype=SEGMENT)
    for i, (tokens, trained) in enumerate(segments):
        row, start, end = row_of[i], start_of[i], start_of[i] + len(tokens)
        tokens_BT[row, start:end], trained_BT[row, start:end] = tokens, trained
        table[i] = (row, start, len(tokens), owners[i], sizes[i])
    table.sort(order=["row", "start"])
    if not trained_BT.any():
        raise DataError(f"{source}: no token would be trained ({facts['records']} records).")
    if int(tokens_BT.max()) >= encoder.vocab_size:
        raise DataError(
            f"{inputs['tokenizer']}: its tokens go up to {tokens_BT.max()}, the model's to {encoder.vocab_size - 1}."
        )
    np.save(out / "tokens.npy", tokens_BT)
    np.save(out / "trained.npy", trained_BT)
    np.save(out / "segments.npy", table)
    told = {"row_tokens": config.row_tokens, "num_rows": num_rows, "vocab_size": encoder.vocab_size}
    ids = {name: getattr(encoder, name) for name in ("end_id", "start_id", "pad_id", "silent_ids")}
    write_json(out / "rows.json", told | ids)
    tokens = int(lengths.sum())
    return {
        **facts,
        "rows": num_rows,
        "segments": len(table),
        "tokens": tokens,
        "trained_tokens": int(trained_BT.sum()),
        "trained_share": round(float(trained_BT.sum() / tokens), 4),
        "trained_bytes": int(table["trained_bytes"].sum()),
        "fill": round(tokens / (num_rows * config.row_tokens), 4),
    }


def _cut(
    encoded: Encoded, config: RowsConfig, start_id: int, *, is_text: bool
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Cuts a record's tokens into segments; each one that doesn't start with a template's BOS is given one."""
    room, opened = config.row_tokens - 1, is_text
    segments, at = [], 0
    while at < len(encoded.tokens_N):
        size = room if opened else config.row_tokens
        part = slice(at, at + size)
        tokens, trained, sizes = encoded.tokens_N[part], encoded.trained_N[part].copy(), encoded.bytes_N[part]
        if opened:
            tokens, trained = np.concatenate([[start_id], tokens]), np.concatenate([[False], trained])
            sizes = np.concatenate([[0], sizes])
        trained[0] = False
        if trained.any():
            segments.append((tokens, trained, int(sizes[trained].sum())))
        at, opened = at + size, True
    return segments
