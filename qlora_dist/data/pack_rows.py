"""Stage `rows`: the records of a shard or a held-out set are tokenized and packed; `rows.Rows` reads the result.

T slots of a row, S segments.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qlora_dist.config.data import LongRecords
from qlora_dist.config.stages import RowsConfig
from qlora_dist.data.encode import Encoded, Encoder, tokenizer_digest
from qlora_dist.data.packing import pack
from qlora_dist.data.record import Record, Reject, in_batches, read_records
from qlora_dist.data.segments import Scratch, Segment, cut, row_blocks
from qlora_dist.data.words import place
from qlora_dist.errors import DataError, bad_value
from qlora_dist.runtime import Facts, Progress, write_json

SEGMENT = np.dtype([("row", "<i8"), ("start", "<i4"), ("length", "<i4"), ("record", "<i8"), ("trained_bytes", "<i8")])
"""One entry of `segments.npy`: which slots of which row belong to which record."""


def write_rows(config: RowsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Tokenizes the records of a split or a shard and packs them into rows of `row_tokens`.

    Memory holds a batch of records and some 60 bytes a segment, whatever the size of the corpus.

    Raises:
        ConfigError: if the overlap leaves no room in a row.
        DataError: if the template or the tokenizer can't be used, or no token would be trained.
    """
    if config.render.overlap_tokens >= config.row_tokens - 1:
        wanted = f"less than row_tokens - 1 = {config.row_tokens - 1}"
        raise bad_value("render.overlap_tokens", config.render.overlap_tokens, wanted)
    source = inputs["shards"] / f"shard-{config.shard}.jsonl" if "shards" in inputs else None
    source = source or inputs["splits"] / f"{config.split}.jsonl"
    encoder = Encoder(inputs["tokenizer"], config.render)
    with Scratch(out / "scratch") as scratch:
        counts = _tokenize(source, encoder, config, scratch, out)
        facts = _pack(scratch, encoder.pad_id, config.row_tokens, out)
    if config.split == "train" and not facts["trained_tokens"]:
        why = dict(counts["left_out"]) or f"{counts['records']} records, none with an answer"
        raise DataError(f"{source}: no token would be trained ({why}).")
    ids = {name: getattr(encoder, name) for name in ("end_id", "start_id", "pad_id", "silent_ids", "vocab_size")}
    ids |= {"tokenizer_sha256": tokenizer_digest(inputs["tokenizer"])}
    write_json(out / "rows.json", {"row_tokens": config.row_tokens, "num_rows": facts["rows"], **ids})
    return counts | facts


def _tokenize(source: Path, encoder: Encoder, config: RowsConfig, scratch: Scratch, out: Path) -> Facts:
    """Writes the segments of all records to the scratch file, and who the records are."""
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    is_checked = False
    progress = Progress(max(1, source.stat().st_size >> 20), unit="MB")
    with (
        (out / "records.jsonl").open("w", encoding="utf-8") as names,
        (out / "rejects.jsonl").open("w", encoding="utf-8") as rejects,
    ):
        for batch in in_batches(_repeated(read_records(source), config.split)):
            if not is_checked and any(record.messages for record in batch):
                encoder.check_template()
                is_checked = True
            progress.update(min(progress.total, counts["bytes"] >> 20))
            for record, encoded in zip(batch, encoder.encode(batch), strict=True):
                result = encoded if isinstance(encoded, str) else _segments(record, encoded, encoder, config)
                if isinstance(result, str):
                    left_out[result] += 1
                    rejects.write(Reject(file=record.file, line=record.line, reason=result, broken=False).to_line())
                    continue
                for segment in result:
                    scratch.append(segment, counts["records"])
                counts["records"] += 1
                counts["bytes"] += sum(len(part.encode()) for part in record.parts())
                names.write(_name(record))
    return {"records": counts["records"], "bytes": counts["bytes"], "left_out": dict(sorted(left_out.items()))}


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


def _pack(scratch: Scratch, pad_id: int, row_tokens: int, out: Path) -> Facts:
    """Packs the segments of the scratch file into `tokens.npy`, `trained.npy` and `segments.npy`, block by block."""
    pieces = scratch.pieces()
    length_S = pieces["length"].astype(np.int64)
    row_S, start_S, num_rows = pack(length_S, row_tokens)
    offset_S = np.cumsum(length_S) - length_S
    order = np.lexsort((start_S, row_S))
    table = np.zeros(len(pieces), dtype=SEGMENT)
    table["row"], table["start"] = row_S[order], start_S[order]
    for name in ("length", "record", "trained_bytes"):
        table[name] = pieces[name][order]
    np.save(out / "segments.npy", table)
    trained_tokens = 0
    with (out / "tokens.npy").open("wb") as tokens, (out / "trained.npy").open("wb") as trained:
        _write_header(tokens, "<u4", (num_rows, row_tokens))
        _write_header(trained, "|b1", (num_rows, row_tokens))
        for first, end, low, high in row_blocks(table["row"], num_rows, row_tokens):
            tokens_BT = np.full((end - first, row_tokens), pad_id, dtype="<u4")
            trained_BT = np.zeros((end - first, row_tokens), dtype=bool)
            for i in range(low, high):
                row, slots = table["row"][i] - first, slice(table["start"][i], table["start"][i] + table["length"][i])
                tokens_BT[row, slots], trained_BT[row, slots] = scratch.read(offset_S[order[i]], table["length"][i])
            trained_tokens += int(trained_BT.sum())
            tokens.write(tokens_BT.tobytes())
            trained.write(trained_BT.tobytes())
    num_tokens = int(length_S.sum())
    return {
        "rows": num_rows,
        "segments": len(table),
        "tokens": num_tokens,
        "trained_tokens": trained_tokens,
        "trained_share": round(trained_tokens / max(1, num_tokens), 4),
        "trained_bytes": int(table["trained_bytes"].sum()),
        "fill": round(num_tokens / max(1, num_rows * row_tokens), 5),
        "lengths": token_lengths(table),
    }


def token_lengths(segments: np.ndarray) -> dict[str, Any]:
    """Returns the number of records of packed rows' segments, quantiles of their tokens, and a histogram.

    A record is as long as its segments together; the histogram's `edges` are powers of √2, one more than its `counts`.
    """
    length_N = np.bincount(segments["record"], weights=segments["length"]).astype(np.int64)
    length_N = length_N[length_N > 0]
    if not len(length_N):
        return {"records": 0}
    first, last = int(2 * np.log2(length_N.min())), int(2 * np.log2(length_N.max())) + 1
    edges = [2 ** (half / 2) for half in range(first, last + 1)]
    edges[-1] = max(edges[-1], float(length_N.max()))
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "records": len(length_N),
        "least": int(length_N.min()),
        **{name: int(np.quantile(length_N, share, method="higher")) for name, share in quantiles.items()},
        "most": int(length_N.max()),
        "histogram": {"edges": [round(e, 2) for e in edges], "counts": np.histogram(length_N, edges)[0].tolist()},
    }


def _write_header(file: BinaryIO, dtype: str, shape: tuple[int, int]) -> None:
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
