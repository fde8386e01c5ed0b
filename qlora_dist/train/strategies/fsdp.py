"""`fsdp`: each rank holds its part of every layer's frozen weights, and gathers one layer at a time (FSDP2).

The weights travel as they are stored, so 4 bits stay 4 bits on the wire, and no cast can touch the packed bytes.
The adapters are kept out of the sharding: they are small, and so checkpoints and clipping know no wrapper.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qlora_dist.model.prequantized import PrequantizedReader
from qlora_dist.train.loss import LaneModel
from qlora_dist.train.strategies.ddp import ReplicatedBase, frozen_parameters


class ShardedBase(ReplicatedBase):
    """The base sharded over the ranks; with `ranks_per_group` below the world size, over groups of that many."""

    name = "fsdp"

    def __init__(self, ranks_per_group: int = 0) -> None:
        super().__init__()
        self.num_parts = ranks_per_group or self.world_size

    def prepare(self, model: LaneModel) -> None:
        """Shards every decoder layer, then what is left (embedding, norm, head)."""
        shape = (self.world_size // self.num_parts, self.num_parts)
        names = ("replicate", "shard")
        if shape[0] == 1:
            shape, names = shape[1:], names[1:]  # type: ignore[assignment]
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        adapters = {p for p in model.parameters() if p.requires_grad}
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh, ignored_params=adapters, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, ignored_params=adapters, reshard_after_forward=True)

    def read(self, model: LaneModel, reader: PrequantizedReader) -> None:
        """Divides the empty shapes, then reads this rank's part of each tensor alone."""
        self.prepare(model)
        reader.fill_parts(model.model)

    def base_bytes(self, model: LaneModel) -> int:
        """Returns the bytes of the base's weights that this rank holds."""
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in frozen_parameters(model))
        return sum(part.numel() * part.element_size() for part in parts)


def decoder_layers(model: LaneModel) -> list[nn.Module]:
    """Returns the decoder layers of a Hugging Face causal language model."""
    layers: list[nn.Module] = list(model.model.get_decoder().layers)
    return layers
