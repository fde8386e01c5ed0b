"""The bank: the factors of all lanes, laid out so that lanes of like shape are multiplied, clipped and stepped at once.

Lanes that adapt the same layers at about the same rank form a group. A group's values are one matrix with a row for
each lane, which holds A and B of every layer, one after another. So all lanes' factors of a layer are one strided
tensor for a batched product, and all of one lane's are one vector for its optimizer. Ranks are padded with zeros to
the group's largest; zeros get no gradient (h = A x and B^T dy are 0 there), so they stay zeros.

Shape letters: G lanes of a group, P values of a lane, R lora_rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_dist.runtime import device

NARROWEST = 16
"""Products with fewer columns than this take as long: smaller ranks share a group, padded to its largest."""

Factor = tuple[torch.Tensor, torch.Tensor]
"""A_RI and B_RO of one layer; B lies transposed, since its gradient is then 1.6 times as fast to sum (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of neighbouring lanes of a group for one layer, and where their gradients are summed."""

    A_GRI: torch.Tensor
    B_GRO: torch.Tensor
    grad_A_GRI: torch.Tensor
    grad_B_GRO: torch.Tensor
    scale_G11: torch.Tensor


class Group(nn.Module):
    """The values and gradients of some lanes, each a row [P] of one float32 matrix.

    Args:
        shapes: (I, O) of each layer that its lanes adapt, by name.
        scales: each lane's alpha / rank.
        rank: the greatest rank of its lanes.
        dtype: what factors are multiplied in.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], scales: Sequence[float], rank: int, dtype: torch.dtype):
        super().__init__()
        self.shapes, self.rank = dict(shapes), rank
        self.offsets: dict[str, int] = {}
        size = 0
        for name, (num_in, num_out) in self.shapes.items():
            self.offsets[name] = size
            size += rank * (num_in + num_out)
        self.values_GP = nn.Parameter(torch.zeros(len(scales), size, device=device()))
        self.grads_GP = torch.zeros_like(self.values_GP, requires_grad=False)
        own = dtype == torch.float32
        self.multiplied_GP = self.values_GP.detach() if own else self.values_GP.detach().to(dtype)
        # In float32 whatever is multiplied: 16/12 in bfloat16 would be 0.2 % off.
        self.scale_G11 = torch.tensor(scales, device=device(), dtype=torch.float32)[:, None, None]
        self._factors: dict[tuple[int, int], dict[str, Factors]] = {}

    def refresh(self) -> None:
        """Casts the values to the dtype that they are multiplied in; due after every change of them."""
        if self.multiplied_GP.dtype != torch.float32:
            self.multiplied_GP.copy_(self.values_GP.detach())

    def factors(self, first: int, end: int) -> dict[str, Factors]:
        """Returns the factors of lanes first … end - 1 of the group by layer: views, made once."""
        if (first, end) not in self._factors:
            values_GP, grads_GP, scale_G11 = (
                whole[first:end] for whole in (self.multiplied_GP, self.grads_GP, self.scale_G11)
            )
            self._factors[first, end] = {
                name: Factors(*self.views(name, values_GP), *self.views(name, grads_GP), scale_G11)
                for name in self.shapes
            }
        return self._factors[first, end]

    def views(self, name: str, values_XP: torch.Tensor) -> Factor:
        """Returns A_XRI and B_XRO of a layer as views of rows of values, padding included."""
        num_in, num_out = self.shapes[name]
        start = self.offsets[name]
        middle, end = start + self.rank * num_in, start + self.rank * (num_in + num_out)
        A_XRI = values_XP[..., start:middle].unflatten(-1, (self.rank, num_in))
        return A_XRI, values_XP[..., middle:end].unflatten(-1, (self.rank, num_out))

    def named_views(self, values_P: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
        """Returns one lane's own values (or gradients, or moments) by parameter name, padding left out."""
        named = {}
        for layer in self.shapes:
            A_RI, B_RO = self.views(layer, values_P)
            named[f"{layer}.lora_A.weight"] = A_RI[:rank]
            named[f"{layer}.lora_B.weight"] = B_RO[:rank].T
        return named


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides which lanes share a group: their layers with (I, O), and their rank."""

    layers: tuple[tuple[str, tuple[int, int]], ...]
    lora_rank: int

    @property
    def kind(self) -> tuple[object, int]:
        """Returns the same for lanes that share a group: ranks up to 16, up to 32, up to 64, and so on."""
        return self.layers, max(NARROWEST, 1 << (self.lora_rank - 1).bit_length())


class Bank(nn.Module):
    """All groups, and which lane is where: lane k is row `place[k][1]` of group `place[k][0]`."""

    def __init__(self, shapes: Sequence[Shape], scales: Sequence[float], dtype: torch.dtype):
        super().__init__()
        members: dict[tuple[object, int], list[int]] = {}
        for lane, shape in enumerate(shapes):
            members.setdefault(shape.kind, []).append(lane)
        self.place = {lane: (g, row) for g, own in enumerate(members.values()) for row, lane in enumerate(own)}
        self.groups = nn.ModuleList(
            Group(
                dict(shapes[own[0]].layers),
                [scales[lane] for lane in own],
                max(shapes[lane].lora_rank for lane in own),
                dtype,
            )
            for own in members.values()
        )

    def group_of(self, lane: int) -> tuple[Group, int]:
        """Returns a lane's group and its row there."""
        group, row = self.place[lane]
        return self.groups[group], row  # type: ignore[return-value]

    def refresh(self) -> None:
        """Has every group cast its values anew."""
        for group in self.groups:
            group.refresh()  # type: ignore[operator]
