"""Stage `rows`: the records of a shard or a held-out set are tokenized and packed; `rows.Rows` reads the result.

T slots of a row, S segments.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qlora_dist.config.data import LongRecords
from qlora_dist.config.stages import RowsConfig
from qlora_dist.data.blocks import Block, blocks_of, join_files
from qlora_dist.data.encode import Encoded, Encoder, open_encoder, tokenizer_digest
from qlora_dist.data.packing import pack
from qlora_dist.data.record import Record, Reject, in_batches, parse_record
from qlora_dist.data.segments import PIECE, Scratch, Segment, cut
from qlora_dist.data.words import place
from qlora_dist.data.workers import Workers
from qlora_dist.errors import DataError, bad_value
from qlora_dist.runtime import Facts, Progress, write_json

SEGMENT = np.dtype([("row", "<i8"), ("start", "<i4"), ("length", "<i4"), ("record", "<i8"), ("trained_bytes", "<i8")])
"""One entry of `segments.npy`: which slots of which row belong to which record."""

PLACED = np.dtype([*SEGMENT.descr, ("block", "<i4"), ("offset", "<i8")])
"""A segment with its row, and where its tokens lie: the block of records, and the token in that block."""

PACKED_AT_ONCE = 2**19
"""So many segments are packed together; of more, each such window has rows of its own. Its last few rows, at most, are
less than full."""

BUFFERED_TOKENS = 2**21


def write_rows(config: RowsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Tokenizes the records of a split or a shard and packs them into rows of `row_tokens`.

    Memory holds blocks of records and windows of segments, one a core, whatever the size of the corpus; the same bytes
    come out for any number of cores.

    Raises:
        ConfigError: if the overlap leaves no room in a row.
        DataError: if the template or the tokenizer can't be used, or no token would be trained.
    """
    if config.render.overlap_tokens >= config.row_tokens - 1:
        wanted = f"less than row_tokens - 1 = {config.row_tokens - 1}"
        raise bad_value("render.overlap_tokens", config.render.overlap_tokens, wanted)
    source = inputs["shards"] / f"shard-{config.shard}.jsonl" if "shards" in inputs else None
    source = source or inputs["splits"] / f"{config.split}.jsonl"
    encoder = open_encoder(inputs["tokenizer"], config.render)
    scratch = out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    packer = _Packer(config, inputs["tokenizer"], blocks_of([source]), scratch)
    with Workers() as workers:
        counts = packer.tokenize(out, workers)
        facts = packer.pack(out, workers)
    shutil.rmtree(scratch)
    if config.split == "train" and not facts["trained_tokens"]:
        why = dict(counts["left_out"]) or f"{counts['records']} records, none with an answer"
        raise DataError(f"{source}: no token would be trained ({why}).")
    ids = {name: getattr(encoder, name) for name in ("end_id", "start_id", "pad_id", "silent_ids", "vocab_size")}
    ids |= {"tokenizer_sha256": tokenizer_digest(inputs["tokenizer"])}
    write_json(out / "rows.json", {"row_tokens": config.row_tokens, "num_rows": facts["rows"], **ids})
    return counts | facts


@dataclass(frozen=True, slots=True)
class _Packer:
    """Tokenizes block by block, packs window by window, and writes the rows piece by piece."""

    config: RowsConfig
    tokenizer: Path
    blocks: Sequence[Block]
    folder: Path

    def tokenize(self, out: Path, workers: Workers) -> Facts:
        """Writes the segments of all records to scratch files, and who the records are to `records.jsonl`."""
        counts: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        length: Counter[int] = Counter()
        progress = Progress(2 * max(1, len(self.blocks)), unit="block")
        for number, (own, reasons, lengths) in enumerate(workers.map(self._tokenize, self.blocks), start=1):
            counts.update(own)
            left_out.update(reasons)
            length.update(lengths)
            progress.update(number)
        for name in ("records.jsonl", "rejects.jsonl"):
            join_files([self._path(block.number).with_suffix(f".{name}") for block in self.blocks], out / name)
        facts = {"records": counts["records"], "bytes": counts["bytes"], "left_out": dict(sorted(left_out.items()))}
        return facts | {"cut_records": counts["cut"], "lengths": token_lengths(length)}

    def pack(self, out: Path, workers: Workers) -> Facts:
        """Packs the segments into `tokens.npy`, `trained.npy` and `segments.npy`."""
        sizes = [
            (len(pieces), int(pieces["record"][-1]) + 1) if len(pieces) else (0, 0) for pieces in self._all_pieces()
        ]
        ends, records = (np.cumsum([size[i] for size in sizes], dtype=np.int64) for i in (0, 1))
        num = int(ends[-1]) if len(ends) else 0
        num_windows = -(-num // PACKED_AT_ONCE)
        borders = [num * i // max(1, num_windows) for i in range(num_windows + 1)]
        windows = [(i, low, high, ends, records) for i, (low, high) in enumerate(pairwise(borders))]
        packed = list(workers.map(self._pack, windows))
        num_rows, row_tokens = sum(rows for rows, *_ in packed), self.config.row_tokens
        for name, dtype in (("tokens", "<u4"), ("trained", "|b1")):
            with (out / f"{name}.npy").open("wb") as file:
                size = (
                    _write_header(file, dtype, (num_rows, row_tokens))
                    + num_rows * row_tokens * np.dtype(dtype).itemsize
                )
                file.truncate(size)
        self._write_table(out / "segments.npy", num, [rows for rows, *_ in packed])
        step = max(1, BUFFERED_TOKENS // row_tokens)
        firsts = np.cumsum([0, *(rows for rows, *_ in packed)]).tolist()
        tasks = [
            (window, low, min(low + step, rows), firsts[window], num_rows, out)
            for window, (rows, *_) in enumerate(packed)
            for low in range(0, rows, step)
        ]
        trained_tokens = sum(workers.map(self._fill, tasks))
        num_tokens, trained_bytes = (sum(found[i] for found in packed) for i in (1, 2))
        return {
            "rows": num_rows,
            "segments": num,
            "tokens": num_tokens,
            "trained_tokens": trained_tokens,
            "trained_share": round(trained_tokens / max(1, num_tokens), 4),
            "trained_bytes": trained_bytes,
            "fill": round(num_tokens / max(1, num_rows * row_tokens), 5),
        }

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number}"

    def _all_pieces(self) -> Iterator[np.ndarray]:
        return (self._pieces(block.number) for block in self.blocks)

    def _pieces(self, number: int) -> np.ndarray:
        with Scratch(self._path(number), "rb") as scratch:
            return scratch.pieces()

    def _tokenize(self, block: Block) -> tuple[Counter[str], Counter[str], Counter[int]]:
        """Writes the segments of a block; returns counts, reasons why records were left out, and their lengths."""
        encoder, config = open_encoder(self.tokenizer, self.config.render), self.config
        counts: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        length: Counter[int] = Counter()
        is_checked = False
        path = self._path(block.number)
        with ExitStack() as stack:
            names, rejects = (
                stack.enter_context(path.with_suffix(f".{name}").open("w", encoding="utf-8"))
                for name in ("records.jsonl", "rejects.jsonl")
            )
            scratch = stack.enter_context(Scratch(path, "wb"))
            for batch in in_batches(_repeated(map(parse_record, block.lines()), config.split)):
                if not is_checked and any(record.messages for record in batch):
                    encoder.check_template()
                    is_checked = True
                for record, encoded in zip(batch, encoder.encode(batch), strict=True):
                    result = encoded if isinstance(encoded, str) else _segments(record, encoded, encoder, config)
                    if isinstance(result, str):
                        left_out[result] += 1
                        reject = Reject(file=record.file, line=record.line, reason=result, broken=False)
                        rejects.write(reject.to_line())
                        continue
                    for segment in result:
                        scratch.append(segment, counts["records"])
                    counts["records"] += 1
                    counts["cut"] += len(result) > 1
                    counts["bytes"] += sum(len(part.encode()) for part in record.parts())
                    length[sum(len(segment.tokens_N) for segment in result)] += 1
                    names.write(_name(record))
        return counts, left_out, length

    def _pack(self, window: tuple[int, int, int, np.ndarray, np.ndarray]) -> tuple[int, int, int]:
        """Packs segments `low` to `high`, and writes their table by row; returns rows, tokens and trained bytes."""
        number, low, high, ends, records = window
        first, last = np.searchsorted(ends, [low, high - 1], side="right").tolist()
        found = []
        for i in range(first, last + 1):
            pieces = self._pieces(i)
            placed = np.zeros(len(pieces), dtype=PLACED)
            for name in PIECE.names or ():
                placed[name] = pieces[name]
            placed["record"] += records[i - 1] if i else 0
            placed["block"], placed["offset"] = i, np.cumsum(pieces["length"], dtype=np.int64) - pieces["length"]
            start = int(ends[i]) - len(pieces)
            found.append(placed[max(0, low - start) : high - start])
        table = np.concatenate(found)
        row_S, start_S, num_rows = pack(table["length"].astype(np.int64), self.config.row_tokens)
        table["row"], table["start"] = row_S, start_S
        np.save(self._window(number), table[np.lexsort((start_S, row_S))])
        return num_rows, int(table["length"].sum(dtype=np.int64)), int(table["trained_bytes"].sum())

    def _window(self, number: int) -> Path:
        return self.folder / f"window-{number}.npy"

    def _write_table(self, path: Path, num: int, rows: Sequence[int]) -> None:
        with path.open("wb") as file:
            _write_header(file, np.lib.format.dtype_to_descr(SEGMENT), (num,))
            first = 0
            for number, num_rows in enumerate(rows):
                table = np.load(self._window(number))
                table["row"] += first
                file.write(np.ascontiguousarray(table[list(SEGMENT.names or ())].astype(SEGMENT)).tobytes())
                first += num_rows

    def _fill(self, task: tuple[int, int, int, int, int, Path]) -> int:
        """Writes rows `low` to `high` of a window to their place; returns how many of their tokens are trained."""
        window, low, high, first, num_rows, out = task
        table: np.ndarray = np.load(self._window(window), mmap_mode="r")
        start, end = np.searchsorted(table["row"], [low, high])
        pad_id, row_tokens = open_encoder(self.tokenizer, self.config.render).pad_id, self.config.row_tokens
        tokens_BT = np.full((high - low, row_tokens), pad_id, dtype="<u4")
        trained_BT = np.zeros((high - low, row_tokens), dtype=bool)
        segments = np.array(table[start:end])
        for number in np.unique(segments["block"]).tolist():
            with Scratch(self._path(number), "rb") as scratch:
                for segment in segments[segments["block"] == number]:
                    slots = slice(segment["start"], segment["start"] + segment["length"])
                    row = segment["row"] - low
                    tokens_BT[row, slots], trained_BT[row, slots] = scratch.read(segment["offset"], segment["length"])
        for name, values_BT in (("tokens", tokens_BT), ("trained", trained_BT)):
            with (out / f"{name}.npy").open("r+b") as file:
                file.seek(-(num_rows - first - low) * values_BT[0].nbytes, 2)
                file.write(values_BT.tobytes())
        return int(trained_BT.sum())


def _segments(record: Record, encoded: Encoded, encoder: Encoder, config: RowsConfig) -> list[Segment] | str:
    """Returns a record's segments, those without a target left out, or the reason why it has none."""
    segments = cut(
        encoded,
        config.row_tokens,
        encoder.start_id,
        is_text=bool(record.text),
        overlap_tokens=config.render.overlap_tokens,
    )
    if len(segments) > 1 and config.render.long_records is LongRecords.drop:
        return "longer than a row"
    return [segment for segment in segments if segment.trained_N.any()] or "no trained token"


def _repeated(records: Iterator[Record], split: str) -> Iterator[Record]:
    """Yields each training record as often as its source's weight says: 2.5 is twice or thrice, by its id."""
    for record in records:
        whole, rest = divmod(record.weight if split == "train" else 1.0, 1.0)
        times = int(whole) + (place(int(record.id, 16), "weight") < rest)
        for _ in range(times):
            yield record


def _name(record: Record) -> str:
    known = {"id": record.id, "cluster": record.cluster, "source": f"{record.file}:{record.line}", "kind": record.kind}
    return json.dumps(known | ({"licence": record.licence} if record.licence else {}), ensure_ascii=False) + "\n"


def token_lengths(num_of: Mapping[int, int]) -> dict[str, Any]:
    """Returns how many records there are, quantiles of their tokens, and a histogram; `num_of` counts them by tokens.

    A record is as long as its segments together; the histogram's `edges` are powers of √2, one more than its `counts`.
    """
    if not num_of:
        return {"records": 0}
    length_L = np.array(sorted(num_of), dtype=np.int64)
    num_L = np.array([num_of[length] for length in length_L.tolist()])
    least, most, ends = int(length_L[0]), int(length_L[-1]), np.cumsum(num_L)
    first, last = int(2 * np.log2(least)), int(2 * np.log2(most)) + 1
    edges = [2 ** (half / 2) for half in range(first, last + 1)]
    edges[-1] = max(edges[-1], float(most))
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    at = {
        name: np.searchsorted(ends, np.ceil(share * (ends[-1] - 1)), side="right") for name, share in quantiles.items()
    }
    counts = np.histogram(length_L, edges, weights=num_L)[0].astype(int)
    return {
        "records": int(ends[-1]),
        "least": least,
        **{name: int(length_L[i]) for name, i in at.items()},
        "most": most,
        "histogram": {"edges": [round(e, 2) for e in edges], "counts": counts.tolist()},
    }


def _write_header(file: BinaryIO, dtype: object, shape: tuple[int, ...]) -> int:
    """Writes the header of an array file, and returns its size."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()
