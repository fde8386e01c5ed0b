"""What is kept of one held-out document: sums, from which every likelihood measure and interval is made later."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dist.evaluate.likelihood import Slots
from qlora_dist.evaluate.statistics import Estimate, estimate_ratio

Place = tuple[int, slice]
Mask = NDArray[np.bool_]

DOCUMENTS_FILE = "documents.jsonl"
SCORES_FILE = "scores.json"


@dataclass(kw_only=True, slots=True)
class Document:
    """One document's sums over its targets.

    `nll` counts every target in nats; `nll_bits` counts those that carry bytes, in bits; `bytes` are theirs.
    `correct` counts the targets that were the likeliest token; `kl` sums KL(base || model), and is 0 where it
    was not measured; `term_nll` counts the targets that spell one of the domain's `terms`.
    """

    domain: str
    split: str
    record: str
    cluster: str
    nll: float = 0.0
    nll_bits: float = 0.0
    correct: float = 0.0
    kl: float = 0.0
    term_nll: float = 0.0
    terms: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, slots: Slots, at: Place, trained_T: Mask, carries_T: Mask, num_bytes: int) -> None:
        """Adds the targets of one segment, whose slots stand `at` a row; `carries_T` marks those that carry bytes."""
        self.nll += float(slots.nll_BT[at].sum())
        self.nll_bits += float(slots.nll_BT[at][carries_T].sum()) / math.log(2)
        self.correct += float(slots.correct_BT[at].sum())
        self.kl += float(slots.kl_BT[at].sum())
        self.tokens += int(trained_T.sum())
        self.bytes += num_bytes


MEASURES = {
    "bits_per_byte": ("nll_bits", "bytes"),
    "completion_loss": ("nll", "tokens"),
    "next_token_accuracy": ("correct", "tokens"),
    "token_kl": ("kl", "tokens"),
    "term_loss": ("term_nll", "terms"),
}
"""Each likelihood measure is a ratio of sums over documents: (top, bottom)."""


def estimate(documents: Sequence[Document], metric: str) -> Estimate | None:
    """Returns a measure over documents with its interval by cluster; None if nothing was measured."""
    top, bottom = MEASURES[metric]
    tops = np.array([getattr(d, top) for d in documents], dtype=np.float64)
    bottoms = np.array([getattr(d, bottom) for d in documents], dtype=np.float64)
    if not bottoms.sum() or (metric == "token_kl" and not tops.any()):
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
