"""Lanes: K LoRA adapters trained at once over one frozen base, each with a recipe of its own.

A micro-batch holds rows of every lane, one lane's after another's. The base computes on all of them at once; each
lane's factors touch its own rows only, so no lane can see or change another.

Shape letters: K lanes, B rows, T slots, I inputs and O outputs of a layer, R lora_rank, P values of a lane.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from zlib import crc32

import torch
from torch import nn

from qlora_dist.config.train import LoraConfig, Optimizer, TrainConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import TrainError
from qlora_dist.model.frozen import FrozenLinear, hold_frozen
from qlora_dist.model.lora import attach_lora
from qlora_dist.runtime import set_seed
from qlora_dist.train.bank import Bank, Group, Shape
from qlora_dist.train.budget import Budget
from qlora_dist.train.fused import Run, Site, lane_product
from qlora_dist.train.moments import FactorAdam, adamw

PEFT_PREFIX = "base_model.model."
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True, eq=False)
class Lane:
    """One adapter in training: its recipe, its rows, its factors and its optimizer.

    `parameters` are views, by name, of `values_P`, the one vector that the optimizer steps.
    """

    name: str
    lora: LoraConfig
    train: TrainConfig
    seed: int
    rows: Rows
    budget: Budget
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    peft_config: Any = None
    optimizer: torch.optim.Optimizer | FactorAdam | None = None
    values_P: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.zeros(0)))
    _group: Group | None = None

    def is_active(self, step: int) -> bool:
        """Says whether this lane still trains at `step`; lanes may have budgets of their own."""
        return step < self.budget.num_steps

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the factors under the names of PEFT's files."""
        return {f"{PEFT_PREFIX}{name}": value.detach() for name, value in self.parameters.items()}

    def sit(self, group: Group, row: int) -> None:
        """Takes its place in the bank: `row` of `group` holds its values and gradients from now on."""
        self._group = group
        self.values_P = nn.Parameter(group.values_GP.detach()[row])
        self.values_P.grad = group.grads_GP[row]
        grads = group.named_views(self.values_P.grad, self.lora.lora_rank)
        for name, value in group.named_views(self.values_P.detach(), self.lora.lora_rank).items():
            self.parameters[name] = nn.Parameter(value)
            self.parameters[name].grad = grads[name]

    def make_optimizer(self) -> None:
        """Makes this lane's AdamW; the learning rate is set anew at each step."""
        if self.train.optimizer is Optimizer.adamw:
            self.optimizer = adamw(self.train, [self.values_P], fused=True)
            return
        assert self._group is not None
        assert self.values_P.grad is not None
        own = (self.values_P.detach(), self.values_P.grad)
        values, grads = (self._group.named_views(whole, self.lora.lora_rank) for whole in own)
        as_laid = [{n: v if v.is_contiguous() else v.T for n, v in views.items()} for views in (values, grads)]
        self.optimizer = FactorAdam(self.train, *as_laid)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Returns the optimizer's live state by name: `#step`, and `<parameter>#<moment>`; zeros before any step."""
        assert self.optimizer is not None
        assert self._group is not None
        if isinstance(self.optimizer, FactorAdam):
            return self.optimizer.named_state()
        state = self.optimizer.state[self.values_P]
        if not state:
            state["step"] = torch.zeros((), device=self.values_P.device)
            state |= {moment: torch.zeros_like(self.values_P, requires_grad=False) for moment in MOMENTS}
        named = {"#step": state["step"]}
        for moment in MOMENTS:
            views = self._group.named_views(state[moment], self.lora.lora_rank)
            named |= {f"{name}#{moment}": value for name, value in views.items()}
        return named


class Seating:
    """Which rows of the current micro-batch belong to which lane, and the seeds of their dropout.

    Attributes:
        order: all lanes, those that a batched product takes together side by side: rows are best laid in this order.
        row_seeds: by lane, one seed for each of its rows.
        shape: rows and slots of the micro-batch, as the base's first layer finds them.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank, self.row_seeds = bank, dict[int, list[int]]()
        self.shape = torch.Size((0, 0))
        self.order = sorted(bank.place, key=bank.place.__getitem__)
        self.runs: list[Run] = []
        self._rows: dict[int, slice] = {}

    @property
    def rows(self) -> dict[int, slice]:
        """Says which rows are whose; set before a forward pass, with {} for the base alone."""
        return self._rows

    @rows.setter
    def rows(self, rows: dict[int, slice]) -> None:
        self._rows = rows
        self.runs = [self._run(lanes) for lanes in _neighbours(rows, self.bank.place)]
        self.bank.refresh()

    def note_shape(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Notes the shape of the tokens: a hook before the forward of the base's embedding."""
        self.shape = args[0].shape

    def by_row(self, x_XI: torch.Tensor) -> torch.Tensor | None:
        """Returns a layer's input as [B, ..., I], by which rows find their lane; None where it has no rows to find.

        Some layers are given all slots in one line, and experts some of them only.
        """
        if x_XI.dim() > 2:
            return x_XI if len(x_XI) == self.shape[0] else None
        return x_XI.unflatten(0, self.shape) if len(x_XI) == self.shape.numel() else None

    @property
    def is_alone(self) -> bool:
        """Says that one lane has all rows, so that whatever a layer is given is its own."""
        seats = list(self._rows.values())
        return len(seats) == 1 and seats[0] in (slice(None), slice(0, self.shape[0]))

    def _run(self, lanes: list[int]) -> Run:
        group, first = self.bank.group_of(lanes[0])
        rows = slice(self._rows[lanes[0]].start, self._rows[lanes[-1]].stop)
        return Run(rows, group.factors(first, first + len(lanes)))


def _neighbours(rows: dict[int, slice], place: dict[int, tuple[int, int]]) -> list[list[int]]:
    """Splits lanes, as their rows lie, into runs that are side by side in a group too, with equally many rows each."""

    def key(numbered: tuple[int, int]) -> tuple[object, ...]:
        index, lane = numbered
        own, (group, row) = rows[lane], place[lane]
        size = None if own.start is None else own.stop - own.start
        return group, row - index, size, None if size is None else own.start - index * size

    return [[lane for _, lane in run] for _, run in groupby(enumerate(rows), key)]


class LaneLinear(nn.Module):
    """A frozen linear layer with the factors of every lane: y = x W^T + s B A x, each row by its own lane."""

    def __init__(self, frozen: FrozenLinear, seating: Seating, name: str, dropout: dict[int, float]) -> None:
        super().__init__()
        self.frozen, self.name, self.dropout = frozen, name, dropout
        self._seating, self._salt = seating, crc32(name.encode())
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Returns the base's output with each lane's update added to its own rows; with no lane seated, the base's.

        Raises:
            TrainError: if the rows of several lanes, or of one with dropout, can't be told apart in the input.
        """
        runs = self._seating.runs
        seated = [(run.rows, run.factors[self.name]) for run in runs if self.name in run.factors]
        if not seated or not x_BTI.numel():
            y_BTO: torch.Tensor = self.frozen(x_BTI)
            return y_BTO
        rowed_BTI = self._seating.by_row(x_BTI)
        if rowed_BTI is None:
            if not self._seating.is_alone or self._drops():
                raise self._lost(x_BTI)
            rowed_BTI, seated = x_BTI, [(slice(None), factors) for _, factors in seated]
        y_BTO = lane_product(rowed_BTI, self._drop(rowed_BTI), self._anchor, Site(self.frozen, seated))
        return y_BTO.reshape(*x_BTI.shape[:-1], y_BTO.shape[-1])

    def _lost(self, x_BTI: torch.Tensor) -> TrainError:
        rows, slots = self._seating.shape
        wanted = f"{tuple(x_BTI.shape)} of {rows} rows of {slots} tokens, so no row is told from another"
        leaf = self.name.rpartition(".")[2]
        repair = f"Leave {leaf} out of lora.target_modules, or train one adapter a job, with lora.lora_dropout=0"
        return TrainError(f"Layer {self.name} is given {wanted}. {repair}.")

    def _drops(self) -> dict[int, float]:
        """Returns the share that each seated lane drops here, of those that drop any."""
        seated = self._seating.rows if self.training else ()
        return {lane: share for lane in seated if (share := self.dropout.get(lane, 0.0))}

    def _drop(self, x_BTI: torch.Tensor) -> torch.Tensor | None:
        """Drops inputs by masks that are a function of (seed, step, row, layer): a recomputation draws the same.

        Returns nothing where nothing is dropped.
        """
        shares = self._drops()
        if not shares:
            return None
        keep_BTI = torch.ones_like(x_BTI, requires_grad=False)
        generator = torch.Generator(x_BTI.device)
        for lane, share in shares.items():
            for keep_TI, seed in zip(keep_BTI[self._seating.rows[lane]], self._seating.row_seeds[lane], strict=True):
                generator.manual_seed(seed ^ self._salt)
                keep_TI.bernoulli_(1 - share, generator=generator).div_(1 - share)
        return x_BTI * keep_BTI


def attach_lanes(model: nn.Module, lanes: list[Lane]) -> Seating:
    """Puts every lane's factors on the base, drawn by PEFT from the lane's own seed, and freezes all else.

    The factors themselves live in `model.lanes`, a bank; each adapted layer multiplies by views of them. 4-bit layers
    that nobody adapts are held as frozen ones too: bitsandbytes' own would wrap anew what a strategy has divided.

    Returns:
        The seating that says, before each forward, whose rows are where.
    """
    model.requires_grad_(False)
    drawn = [_draw_factors(model, lane) for lane in lanes]
    names = [n for n, _ in model.named_modules() if any(n in factors for factors in drawn)]
    layers = hold_frozen(model, names)
    bank = _fill_bank(lanes, drawn, layers)
    seating = Seating(bank)
    model.get_input_embeddings().register_forward_pre_hook(seating.note_shape)  # type: ignore[operator]
    for name, layer in layers.items():
        dropout = {k: lane.lora.lora_dropout for k, lane in enumerate(lanes) if name in drawn[k]}
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LaneLinear(layer, seating, name, dropout))
    model.lanes = bank
    return seating


Drawn = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""A, B and scale of each layer that a lane adapts."""


def _fill_bank(lanes: list[Lane], drawn: list[Drawn], layers: dict[str, FrozenLinear]) -> Bank:
    """Makes the bank and copies the drawn factors into it."""
    shapes = [
        Shape(tuple((n, (f[n][0].shape[1], f[n][1].shape[0])) for n in layers if n in f), lane.lora.lora_rank)
        for lane, f in zip(lanes, drawn, strict=True)
    ]
    scales = [next(iter(factors.values()))[2] for factors in drawn]
    bank = Bank(shapes, scales, next(iter(layers.values())).product_dtype)
    for k, (lane, factors) in enumerate(zip(lanes, drawn, strict=True)):
        lane.sit(*bank.group_of(k))
        for name, (A_RI, B_OR, _) in factors.items():
            lane.parameters[f"{name}.lora_A.weight"].data.copy_(A_RI)
            lane.parameters[f"{name}.lora_B.weight"].data.copy_(B_OR)
    return bank


def _draw_factors(model: nn.Module, lane: Lane) -> Drawn:
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
