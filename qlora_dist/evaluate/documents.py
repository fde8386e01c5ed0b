"""What is kept of one held-out document: sums, from which every likelihood measure and interval is made later."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.evaluate.statistics import Estimate, estimate_ratio

DOCUMENTS_FILE = "documents.jsonl"


@dataclass(kw_only=True, slots=True)
class Document:
    """One document's sums over its targets.

    `nll` counts every target in nats; `nll_bits` counts those that carry bytes, in bits; `bytes` are theirs.
    """

    domain: str
    split: str
    record: str
    cluster: str
    nll: float = 0.0
    nll_bits: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def add(self, nll: float, nll_of_bytes: float, tokens: int, num_bytes: int) -> None:
        """Adds one segment: nats over all targets, nats over those that carry bytes, their counts."""
        self.nll += nll
        self.nll_bits += nll_of_bytes / math.log(2)
        self.tokens += tokens
        self.bytes += num_bytes


MEASURES = {
    "bits_per_byte": ("nll_bits", "bytes"),
    "completion_loss": ("nll", "tokens"),
}
"""Each likelihood measure is a ratio of sums over documents: (top, bottom)."""


def estimate(documents: Sequence[Document], metric: str) -> Estimate | None:
    """Returns a measure over documents with its interval by cluster; None if nothing was measured."""
    top, bottom = MEASURES[metric]
    tops = np.array([getattr(d, top) for d in documents], dtype=np.float64)
    bottoms = np.array([getattr(d, bottom) for d in documents], dtype=np.float64)
    if not bottoms.sum():
        return None
    return estimate_ratio(tops, bottoms, np.array([d.cluster for d in documents]))


def score_rows(model: str, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Returns the score table of one model: a row for each domain and measure."""
    rows = []
    for domain, split in sorted({(d.domain, d.split) for d in documents}):
        chosen = [d for d in documents if (d.domain, d.split) == (domain, split)]
        for metric in MEASURES:
            if (found := estimate(chosen, metric)) is not None:
                row: dict[str, Any] = {"model": model, "domain": domain, "split": split, "metric": metric}
                row |= {"value": found.value, "low": found.low, "high": found.high, "num_documents": len(chosen)}
                rows.append(row)
    return rows


def write_documents(documents: Iterable[Document], folder: Path) -> None:
    """Writes one JSON line a document, aside and renamed."""
    aside = folder / f".{DOCUMENTS_FILE}"
    aside.write_text("".join(json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
    aside.replace(folder / DOCUMENTS_FILE)


def read_documents(folder: Path) -> list[Document]:
    """Reads what `write_documents` wrote."""
    lines = (folder / DOCUMENTS_FILE).read_text(encoding="utf-8").splitlines()
    return [Document(**json.loads(line)) for line in lines]
