"""How the processes of one training share the work, behind one small protocol.

Adapters are small, so every rank holds them whole, in float32, and takes the same optimizer step on the same
summed gradient. A strategy decides where the frozen base lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from qlora_dist.model.prequantized import PrequantizedReader
from qlora_dist.train.lanes import Lane
from qlora_dist.train.loss import LaneModel


class Strategy(Protocol):
    """What the loop asks of a strategy."""

    name: str
    num_parts: int
    """Into how many parts the base is divided; 1 where every rank holds it whole."""
    rank: int
    world_size: int
    device: torch.device

    def prepare(self, model: LaneModel) -> None:
        """Places a base that is in memory whole: replicated, or sharded over the ranks."""

    def read(self, model: LaneModel, reader: PrequantizedReader) -> None:
        """Reads a pre-quantized base from its file, each rank what it holds of it."""

    def adopt(self, lanes: Sequence[Lane]) -> None:
        """Readies the lanes' optimizers, after the base is placed."""

    def gathered(self, lanes: Sequence[Lane]) -> AbstractContextManager[None]:
        """Has each lane's whole optimizer state at hand on rank 0, inside the `with` block; all ranks enter it."""

    def scatter(self, lanes: Sequence[Lane]) -> None:
        """Takes over factors and optimizer state that were restored, the same on every rank."""

    def agree(self, wish: bool) -> bool:
        """Says whether all ranks do now what this one wishes (a checkpoint), where they can only do it together."""

    def sum_over_ranks(self, values: list[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all ranks, the same bits on every rank."""

    def broadcast(self, values: list[torch.Tensor]) -> None:
        """Replaces each tensor by rank 0's."""

    def base_bytes(self, model: LaneModel) -> int:
        """Returns the bytes of the base's weights that this rank holds."""
