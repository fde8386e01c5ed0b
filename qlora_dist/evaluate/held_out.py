"""A held-out set: its packed rows, and the sums of each document that a model's pass over them leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlora_dist.data.rows import Batch, Rows
from qlora_dist.errors import DataError
from qlora_dist.evaluate.calibration import Calibration
from qlora_dist.evaluate.documents import Document
from qlora_dist.evaluate.likelihood import Slots, measure_rows
from qlora_dist.evaluate.terms import GENERAL, TermMarker
from qlora_dist.runtime import Progress, device


@dataclass(slots=True)
class HeldOut:
    """One held-out set, how much of it is scored, and what was found of it so far."""

    domain: str
    split: str
    rows: Rows
    max_rows: int = 0
    terms: TermMarker | None = None
    calibration: Calibration = field(default_factory=Calibration)
    sums: dict[int, Document] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """The rows that are scored."""
        return min(self.rows.num_rows, self.max_rows or self.rows.num_rows)

    def measure(self, model: Any, batch_tokens: int, progress: Progress, *, with_kl: bool) -> list[Document]:
        """Returns the sums of each document; the divergence from the base is measured on `general` alone.

        Raises:
            DataError: if no slot of these rows is a target, or a sum isn't finite.
        """
        before, with_kl = progress.done, with_kl and self.domain == GENERAL
        for index_B, batch, slots in measure_rows(
            model, self.rows, self.num_rows, batch_tokens, device(), with_kl=with_kl
        ):
            self._add(index_B, batch, slots)
            if np.isfinite(slots.nll_BT).all():  # what is broken is named below
                self.calibration.add(slots, batch.trained_BT)
            progress.update(before + int(index_B[-1]) + 1)
        return self._checked()

    def _add(self, index_B: np.ndarray, batch: Batch, slots: Slots) -> None:
        carries_BT = batch.trained_BT & ~np.isin(batch.tokens_BT, self.rows.silent_ids)
        for b, row in enumerate(index_B):
            for segment in self.rows.segments_of(int(row)):
                at = (b, slice(int(segment["start"]), int(segment["start"]) + int(segment["length"])))
                document = self._document(int(segment["record"]))
                document.add(slots, at, batch.trained_BT[at], carries_BT[at], int(segment["trained_bytes"]))
                if self.terms is not None:
                    marked_T, num_terms = self.terms.mark(batch.tokens_BT[at], batch.trained_BT[at])
                    document.term_nll += float(slots.nll_BT[at][marked_T].sum())
                    document.terms += num_terms

    def _document(self, number: int) -> Document:
        if number not in self.sums:
            record = self.rows.records[number]
            cluster = str(record["cluster"] or record["id"])
            self.sums[number] = Document(
                domain=self.domain, split=self.split, record=str(record["id"]), cluster=cluster
            )
        return self.sums[number]

    def _checked(self) -> list[Document]:
        documents = [self.sums[number] for number in sorted(self.sums)]
        self.calibration.num_documents = len(documents)
        if not any(d.tokens for d in documents):
            key = f"domain.{self.domain}.split.{self.split}_share"
            raise DataError(f"domain.{self.domain}: split {self.split!r} holds nothing to score. Raise {key}.")
        for document in documents:
            if not np.isfinite(document.nll):
                what = f"domain.{self.domain}: document {document.record} has a loss of {document.nll}"
                raise DataError(f"{what}: the model is broken.")
        return documents
