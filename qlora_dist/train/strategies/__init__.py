"""How the processes of one training share the work, behind one small protocol.

Adapters are small, so every rank holds them whole, in float32, and takes the same optimizer step on the same
summed gradient. A strategy decides where the frozen base lives.
"""

from __future__ import annotations

from typing import Protocol

import torch

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
        """Places the base: replicated, or sharded over the ranks."""

    def sum_over_ranks(self, values: list[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all ranks, the same bits on every rank."""

    def broadcast(self, values: list[torch.Tensor]) -> None:
        """Replaces each tensor by rank 0's."""

    def base_bytes(self, model: LaneModel) -> int:
        """Returns the bytes of the base's weights that this rank holds."""
