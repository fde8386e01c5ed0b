"""Stage `scores`: one model, base or adapted, measured on the packed held-out rows of every domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.config.stages import ScoresConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import DataError
from qlora_dist.evaluate.documents import Document, score_rows, write_documents
from qlora_dist.evaluate.likelihood import nll_of_rows
from qlora_dist.runtime import Facts, Progress, device, set_seed, write_json

SCORES_FILE = "scores.json"
ROWS_PREFIX = "rows-"


def score_model(config: ScoresConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes `scores.json` (a row for each domain and measure) and the sums of each document beside it.

    Inputs are `base`, one `rows-<domain>` for each held-out set, and `adapter`: none for the base itself, a PEFT
    folder, or a whole fine-tuned model when `config.full`. Files of an earlier life are written over.

    Raises:
        DataError: if a held-out set holds no target.
        ModelError: if the adapter belongs to another base.
    """
    set_seed(0)
    held_out = {
        name.removeprefix(ROWS_PREFIX): Rows.open(path)
        for name, path in sorted(inputs.items())
        if name.startswith(ROWS_PREFIX)
    }
    model = load_scored_model(config, inputs)
    counts = {domain: _num_rows(config, rows) for domain, rows in held_out.items()}
    progress = Progress(total=sum(counts.values()), unit="row")
    documents: list[Document] = []
    for domain, rows in held_out.items():
        documents += measure(model, rows, domain, config, progress)
    table = score_rows(config.name, documents)
    write_documents(documents, out)
    write_json(out / SCORES_FILE, {"rows": table})
    return {"scores": table, "num_documents": len(documents), "num_targets": sum(d.tokens for d in documents)}


def load_scored_model(config: ScoresConfig, inputs: Mapping[str, Path]) -> Any:
    """Loads the base, with the adapter on it if there is one, or the fine-tuned model in its place."""
    from qlora_dist.model.adapter import load_adapter
    from qlora_dist.model.base import describe_base, load_model, open_base

    base = open_base(inputs["base"])
    if config.full and "adapter" in inputs:
        tuned = inputs["adapter"]
        return load_model(describe_base(tuned, str(tuned), ""), config.model, quantized=False)
    model = load_model(base, config.model)
    return load_adapter(model, inputs["adapter"], base) if "adapter" in inputs else model


def measure(model: Any, rows: Rows, domain: str, config: ScoresConfig, progress: Progress) -> list[Document]:
    """Returns the sums of each document of one held-out set.

    Raises:
        DataError: if no slot of these rows is a target, or a sum isn't finite.
    """
    split = config.evaluate.split
    sums: dict[int, Document] = {}
    before = progress.done
    for index_B, nll_BT, tokens_BT, trained_BT in nll_of_rows(
        model, rows, _num_rows(config, rows), config.evaluate.batch_tokens, device()
    ):
        carries_BT = trained_BT & ~np.isin(tokens_BT, rows.silent_ids)
        for b, row in enumerate(index_B):
            for segment in rows.segments_of(int(row)):
                part = slice(int(segment["start"]), int(segment["start"]) + int(segment["length"]))
                name = int(segment["record"])
                if name not in sums:
                    record = rows.records[name]
                    sums[name] = Document(
                        domain=domain, split=split, record=str(record["id"]), cluster=str(record["cluster"])
                    )
                sums[name].add(
                    float(nll_BT[b, part].sum()),
                    float(nll_BT[b, part][carries_BT[b, part]].sum()),
                    int(trained_BT[b, part].sum()),
                    int(segment["trained_bytes"]),
                )
        progress.update(before + int(index_B[-1]) + 1)
    return _checked([sums[i] for i in sorted(sums)], domain, split)


def _num_rows(config: ScoresConfig, rows: Rows) -> int:
    return min(rows.num_rows, config.evaluate.max_rows or rows.num_rows)


def _checked(documents: list[Document], domain: str, split: str) -> list[Document]:
    if not any(d.tokens for d in documents):
        raise DataError(
            f"domain.{domain}: split {split!r} holds nothing to score. Raise domain.{domain}.split.{split}_share."
        )
    for document in documents:
        if not np.isfinite(document.nll):
            raise DataError(
                f"domain.{domain}: document {document.record} has a loss of {document.nll}: the model is broken."
            )
    return documents
