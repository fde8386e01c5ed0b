"""Lanes: K LoRA adapters trained at once over one frozen base, each with a recipe of its own.

A micro-batch holds rows of every lane, one lane's after another's. The base computes on all of them at once; each
lane's factors touch its own rows only, so no lane can see or change another.

Shape letters: K lanes, B rows, T slots, I inputs and O outputs of a layer, R lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_dist.config.train import LoraConfig, TrainConfig
from qlora_dist.data.rows import Rows
from qlora_dist.model.frozen import FrozenLinear
from qlora_dist.model.lora import attach_lora
from qlora_dist.runtime import device, set_seed
from qlora_dist.train.budget import Budget

PEFT_PREFIX = "base_model.model."


@dataclass(slots=True, eq=False)
class Lane:
    """One adapter in training: its recipe, its rows, its factors and its optimizer."""

    name: str
    lora: LoraConfig
    train: TrainConfig
    seed: int
    rows: Rows
    budget: Budget
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    peft_config: Any = None
    optimizer: torch.optim.Optimizer | None = None

    def is_active(self, step: int) -> bool:
        """Says whether this lane still trains at `step`; lanes may have budgets of their own."""
        return step < self.budget.num_steps

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the factors under the names of PEFT's files."""
        return {f"{PEFT_PREFIX}{name}": value.detach() for name, value in self.parameters.items()}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Makes this lane's AdamW; the learning rate is set anew at each step."""
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=self.train.learning_rate,
            betas=(self.train.adam_beta1, self.train.adam_beta2),
            weight_decay=self.train.weight_decay,
        )
        return self.optimizer


@dataclass(slots=True)
class Seating:
    """Which rows of the current micro-batch belong to which lane, and the seed of this micro-step's dropout."""

    rows: dict[int, slice] = field(default_factory=dict)
    dropout_seeds: dict[int, int] = field(default_factory=dict)


class LaneLinear(nn.Module):
    """A frozen linear layer with the factors of every lane: y = x W^T + s B A x, each row by its own lane."""

    def __init__(self, frozen: FrozenLinear, seating: Seating, index: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        self.scale: dict[int, float] = {}
        self.dropout: dict[int, float] = {}
        self._seating = seating
        self._index = index

    def add(self, lane: int, A_RI: torch.Tensor, B_OR: torch.Tensor, scale: float, dropout: float) -> None:
        """Gives the layer one more lane's factors."""
        self.A[str(lane)] = nn.Parameter(A_RI.detach().to(device(), torch.float32, copy=True))
        self.B[str(lane)] = nn.Parameter(B_OR.detach().to(device(), torch.float32, copy=True))
        self.scale[lane], self.dropout[lane] = scale, dropout

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Returns the base's output with each lane's update added to its own rows; with no lane seated, the base's."""
        y_BTO: torch.Tensor = self.frozen(x_BTI)
        seats = self._seating.rows
        if not seats:
            return y_BTO
        if len(seats) == 1:
            ((lane, _),) = seats.items()
            update = self.update(lane, x_BTI)
            return y_BTO if update is None else y_BTO + update
        parts = []
        for lane, rows in seats.items():
            update = self.update(lane, x_BTI[rows])
            parts.append(y_BTO[rows] if update is None else y_BTO[rows] + update)
        return torch.cat(parts)

    def update(self, lane: int, x_BTI: torch.Tensor) -> torch.Tensor | None:
        """Returns s B A x of one lane, or nothing where it doesn't adapt this layer."""
        if lane not in self.scale:
            return None
        A_RI, B_OR = self.A[str(lane)].to(x_BTI.dtype), self.B[str(lane)].to(x_BTI.dtype)
        return linear(linear(self._drop(lane, x_BTI), A_RI), B_OR) * self.scale[lane]

    def _drop(self, lane: int, x_BTI: torch.Tensor) -> torch.Tensor:
        """Drops inputs by a mask that is a function of (seed, step, rows, layer): a recomputation draws the same."""
        share = self.dropout[lane]
        if not self.training or share == 0:
            return x_BTI
        generator = torch.Generator(x_BTI.device)
        generator.manual_seed(self._seating.dropout_seeds[lane] + self._index)
        keep_BTI = torch.empty_like(x_BTI).bernoulli_(1 - share, generator=generator)
        return x_BTI * keep_BTI / (1 - share)


def attach_lanes(model: nn.Module, lanes: list[Lane]) -> Seating:
    """Puts every lane's factors on the base, drawn by PEFT from the lane's own seed, and freezes all else.

    Returns:
        The seating that says, before each forward, whose rows are where.
    """
    model.requires_grad_(False)
    seating = Seating()
    layers: dict[str, LaneLinear] = {}
    drawn = [_draw_factors(model, lane) for lane in lanes]
    names = [n for n, _ in model.named_modules() if any(n in factors for factors in drawn)]
    for index, name in enumerate(names):
        layers[name] = LaneLinear(FrozenLinear(model.get_submodule(name)), seating, index)  # type: ignore[arg-type]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    for k, (lane, factors) in enumerate(zip(lanes, drawn, strict=True)):
        for name in (n for n in names if n in factors):
            A_RI, B_OR, scale = factors[name]
            layers[name].add(k, A_RI, B_OR, scale, lane.lora.lora_dropout)
            lane.parameters[f"{name}.lora_A.weight"] = layers[name].A[str(k)]
            lane.parameters[f"{name}.lora_B.weight"] = layers[name].B[str(k)]
    return seating


def _draw_factors(model: nn.Module, lane: Lane) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Has PEFT choose the layers and draw the factors, then takes its wrapping off again."""
    from peft.tuners.lora import LoraLayer

    set_seed(lane.seed)
    wrapped = attach_lora(model, lane.lora)
    lane.peft_config = wrapped.peft_config["default"]
    factors = {
        name.removeprefix(PEFT_PREFIX): (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
            float(module.scaling["default"]),
        )
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }
    wrapped.unload()
    return factors
