"""`ddp`: every rank holds the whole frozen base, and one message a step sums the adapters' gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from qlora_dist.model.prequantized import PrequantizedReader
from qlora_dist.runtime import device, rank, world_size
from qlora_dist.train.lanes import Lane
from qlora_dist.train.loss import LaneModel


class ReplicatedBase:
    """The base whole on each rank. With one process it is plain training, and nothing is sent."""

    name = "ddp"

    def __init__(self) -> None:
        self.num_parts = 1
        self.rank, self.world_size, self.device = rank(), world_size(), device()

    def prepare(self, model: LaneModel) -> None:
        """Leaves the base as it is."""

    def read(self, model: LaneModel, reader: PrequantizedReader) -> None:
        """Reads the whole base."""
        reader.fill(model.model)

    def adopt(self, lanes: Sequence[Lane]) -> None:
        """Leaves the lanes' optimizers as they are: whole on each rank."""

    def gathered(self, lanes: Sequence[Lane]) -> AbstractContextManager[None]:
        """Has nothing to gather."""
        return nullcontext()

    def scatter(self, lanes: Sequence[Lane]) -> None:
        """Has nothing to divide."""

    def agree(self, wish: bool) -> bool:
        """Lets each rank do as it wishes: rank 0 saves by itself."""
        return wish

    def sum_over_ranks(self, values: list[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all ranks, in one float32 message."""
        if self.world_size == 1:
            return
        flat = torch.cat([v.flatten().float() for v in values])
        dist.all_reduce(flat)
        _spread(flat, values)

    def broadcast(self, values: list[torch.Tensor]) -> None:
        """Replaces each tensor by rank 0's."""
        if self.world_size == 1:
            return
        for value in values:
            sent = value.to(self.device).contiguous()  # factors may be views with gaps, moments lie on the host
            dist.broadcast(sent, src=0)
            value.copy_(sent)

    def base_bytes(self, model: LaneModel) -> int:
        """Returns the bytes of the base's weights that this rank holds."""
        return sum(p.numel() * p.element_size() for p in frozen_parameters(model))


def frozen_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of the base."""
    return (p for p in model.parameters() if not p.requires_grad)


def _spread(flat: torch.Tensor, values: list[torch.Tensor]) -> None:
    first = 0
    for value in values:
        value.copy_(flat[first : first + value.numel()].view_as(value))
        first += value.numel()
