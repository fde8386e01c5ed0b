"""Stage `records`: the source files of one part are read, checked and cleaned, each drop with its reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from qlora_dist.config.stages import RecordsConfig
from qlora_dist.data import installed
from qlora_dist.data.clean import Dropped, clean
from qlora_dist.data.formats import read_examples
from qlora_dist.data.kinds import Unusable, make_record
from qlora_dist.data.record import Record, Reject
from qlora_dist.data.signatures import INDEX, index_entries
from qlora_dist.data.sources import HUB, INSTALLED, Piece
from qlora_dist.runtime import Facts, write_json

RECORDS, REJECTS, COUNTS = "records.jsonl", "rejects.jsonl", "counts.json"
BATCH_RECORDS = 512


def write_records(config: RecordsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Reads one part of a domain's sources into `records.jsonl`, `rejects.jsonl` and `index.bin`.

    Line i of the records has entry i of the index. Whether too many were rejected is judged over all parts, by
    stage `splits`.
    """
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    with (
        (out / RECORDS).open("w", encoding="utf-8") as kept,
        (out / REJECTS).open("w", encoding="utf-8") as rejects,
        (out / INDEX).open("wb") as index,
    ):
        for batch in _batches(_records(config)):
            records = [item for item in batch if isinstance(item, Record)]
            for item in batch:
                if isinstance(item, Reject):
                    rejects.write(item.to_line())
                    counts["broken" if item.broken else "dropped"] += 1
                    counts[f"reason {item.reason}"] += 1
            if records:
                index.write(index_entries(records).tobytes())
            for record in records:
                kept.write(record.to_line())
                counts["kept"] += 1
                counts["bytes"] += len(record.whole().encode())
                kinds[record.kind] += 1
    reasons = {name.removeprefix("reason "): n for name, n in sorted(counts.items()) if name.startswith("reason ")}
    facts: Facts = {name: counts[name] for name in ("kept", "broken", "dropped", "bytes")}
    facts |= {"kinds": dict(sorted(kinds.items())), "reasons": reasons}
    write_json(out / COUNTS, facts)
    return facts


def read_counts(folder: Path) -> Facts:
    """Returns how many examples of a part were kept, broken and dropped, by kind and by reason."""
    facts: Facts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return facts


def _batches(items: Iterator[Record | Reject]) -> Iterator[list[Record | Reject]]:
    while batch := list(islice(items, BATCH_RECORDS)):
        yield batch


def _records(config: RecordsConfig) -> Iterator[Record | Reject]:
    for text in config.files:
        piece = Piece.parse(text)
        source = config.source.sources[piece.source]
        for item in _examples(piece):
            if isinstance(item, Reject):
                yield item
                continue
            file, line, raw = item
            try:
                record = clean(make_record(raw, source.kind, source.fields), config.source.clean)
            except Unusable as error:
                broken = not isinstance(error, Dropped)
                yield Reject(file=file, line=line, reason=error.reason, detail=error.detail, broken=broken)
                continue
            record.file, record.line, record.source = file, line, piece.source
            record.weight, record.licence = source.weight, source.licence
            record.id = record.content_id()
            yield record


def _examples(piece: Piece) -> Iterator[installed.Example | Reject]:
    if piece.path.startswith(INSTALLED):
        yield from installed.CORPORA[piece.path.removeprefix(INSTALLED)]()
    elif piece.path.startswith(HUB):
        yield from ()
    else:
        path = Path(piece.path)
        for item in read_examples(path, piece.start, piece.end):
            yield item if isinstance(item, Reject) else (path.name, *item)
