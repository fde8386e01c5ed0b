"""Stage `records`: the source files of one part are read, checked and cleaned, each drop with its reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qlora_dist.config.data import SourceConfig, Use
from qlora_dist.config.stages import RecordsConfig
from qlora_dist.data.clean import DroppedError, clean, passages
from qlora_dist.data.kinds import UnusableError, make_record
from qlora_dist.data.record import Record, Reject, in_batches
from qlora_dist.data.signatures import INDEX, index_entries
from qlora_dist.data.sources import Piece, read_piece
from qlora_dist.runtime import Facts, Progress, write_json

RECORDS, REJECTS, COUNTS = "records.jsonl", "rejects.jsonl", "counts.json"


def write_records(config: RecordsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Reads one part of a domain's sources into `records.jsonl`, `rejects.jsonl` and `index.bin`.

    Line i of the records has entry i of the index. Whether too many examples were broken is judged over all parts, by
    stage `splits`.
    """
    counts: Counter[str] = Counter()
    by: dict[str, Counter[str]] = {"kinds": Counter(), "reasons": Counter(), "replaced": Counter()}
    with (
        (out / RECORDS).open("w", encoding="utf-8") as kept,
        (out / REJECTS).open("w", encoding="utf-8") as rejects,
        (out / INDEX).open("wb") as index,
    ):

        def usable() -> Iterator[Record]:
            for item in examples(config, by["replaced"]):
                if isinstance(item, Record):
                    yield item
                    continue
                rejects.write(item.to_line())
                counts["broken" if item.broken else "dropped"] += 1
                by["reasons"][item.reason] += 1

        progress = Progress(max(1, sum(p.end - p.start for p in map(Piece.parse, config.files)) >> 20), unit="MB")
        for batch in in_batches(usable()):
            progress.update(min(progress.total, counts["bytes"] >> 20))
            index.write(index_entries(batch).tobytes())
            for record in batch:
                kept.write(record.to_line())
                counts["kept"] += 1
                counts["bytes"] += sum(len(part.encode()) for part in record.parts())
                by["kinds"][record.kind] += 1
    facts: Facts = {name: counts[name] for name in ("kept", "broken", "dropped", "bytes")}
    facts |= {name: dict(sorted(counter.items())) for name, counter in by.items()}
    write_json(out / COUNTS, facts)
    return facts


def read_counts(folder: Path) -> Facts:
    """Returns how many examples of a part were kept, broken and dropped, by kind and by reason."""
    facts: Facts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return facts


def examples(config: RecordsConfig, replaced: Counter[str] | None = None) -> Iterator[Record | Reject]:
    """Yields each example of a part as a cleaned record, or as a reject; `replaced` counts personal data."""
    for text in config.files:
        piece = Piece.parse(text)
        source = config.source.sources[piece.source]
        for item in read_piece(piece, source):
            if isinstance(item, Reject):
                yield item
                continue
            file, line, raw = item
            try:
                whole = make_record(raw, source.kind, source.fields)
            except UnusableError as error:
                yield Reject(file=file, line=line, reason=error.reason, detail=error.detail)
                continue
            whole.file, whole.line, whole.source = file, line, piece.source
            for record in _passages(whole, source):
                yield _cleaned(record, source, config, replaced)


def _passages(record: Record, source: SourceConfig) -> Iterator[Record]:
    if not record.text or not source.passage_chars:
        yield record
        return
    for passage in passages(record.text, source.passage_chars):
        yield replace(record, text=passage)


def _cleaned(
    record: Record, source: SourceConfig, config: RecordsConfig, replaced: Counter[str] | None
) -> Record | Reject:
    try:
        clean(record, config.source.clean, replaced)
    except UnusableError as error:
        broken = not isinstance(error, DroppedError)
        return Reject(file=record.file, line=record.line, reason=error.reason, detail=error.detail, broken=broken)
    record.weight, record.licence = source.weight, record.licence or source.licence
    record.use = "" if source.use is Use.auto else source.use.value
    record.id = record.content_id()
    return record
