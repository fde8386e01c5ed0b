"""The checks of a life's first steps: rows in their order, each lane taught by its own, all tensors learning.

They run on every rank alike: a sharded base needs all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora_dist.config.model import Quantization
from qlora_dist.config.reading import unread
from qlora_dist.config.train import Method
from qlora_dist.errors import TrainError
from qlora_dist.train.batches import tensors
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.lanes import Lane
from qlora_dist.train.step import Stepper, gradient, row_seeds

READ_WITH_THE_BASE = ("model.path", "model.revision", "model.tiny.")
"""Keys that other stages have read: a training gets what they made of them."""


class Watch:
    """Watches one of the first two steps of what is trained: each tensor has a gradient and moves.

    At the first step of all, B is zero, so A has no gradient yet: it must move at the second.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], is_first: bool) -> None:
        self._parameters = {n: p for n, p in parameters.items() if not (is_first and ".lora_A." in n)}
        self._before = {name: p.detach().clone() for name, p in self._parameters.items()}

    def check(self, certificate: Certificate) -> None:
        """Notes whether the tensors that must have moved did."""
        named = self._parameters
        still = [n for n, p in named.items() if torch.equal(p, self._before[n])]
        dead = [n for n, p in named.items() if p.grad is None or not bool(p.grad.any())]
        bad = sorted({*still, *dead})
        repair = "Gradients don't reach the adapters: use non-reentrant activation checkpointing, freeze no adapter."
        if not dead:
            repair = "Their steps are too small for float32 to hold: raise train.learning_rate."
        certificate.require(
            "every tensor learns",
            not bad and bool(named),
            f"{len(named) - len(bad)} of {len(named)} tensors have a gradient and moved"
            + (f"; not {', '.join(bad[:3])}" if bad else ""),
            repair,
        )


def check_finite(certificate: Certificate, step: int, values: Mapping[str, float]) -> None:
    """Refuses to go on from a step whose loss or gradient norm is infinite or no number.

    Raises:
        TrainError: naming the step and the value.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values.get(name, 0.0)):
            repair = "Lower train.learning_rate, raise train.warmup_share, or set model.compute_dtype=bfloat16"
            raise TrainError(f"Step {step}: {name} is {values[name]}, so the weights are lost. {repair}.")
    certificate.require("the loss is finite", True, f"at each step; {values['loss']:.5g} at step {step}", "")


def check_read(certificate: Certificate, config: Any, is_alone: bool) -> None:
    """Checks, once the first step is taken, that no key was dropped in silence.

    Lanes of one job share model and strategy, which the first one's config says: those are looked at where a training
    is alone. A key that says how or where is only reported, and only there too; so is one that another key makes idle.
    """
    names = (["model", "strategy"] if is_alone else []) + ["train", "lora"]
    parts = {name: getattr(config, name) for name in names}
    left = [k for name, part in parts.items() for k in unread(part, key=name) if not k.startswith(READ_WITH_THE_BASE)]
    idle = [k for name, part in parts.items() for k in unread(part, execution=True, key=name) if is_alone]
    idle = [k for k in left if k.startswith(made_idle(config))] + [
        k for k in idle if not k.startswith(READ_WITH_THE_BASE)
    ]
    left = [k for k in left if k not in idle]
    certificate.require(
        "no config key is left unread",
        not left,
        f"left unread: {', '.join(left)}"
        if left
        else "all that was set away from its default was read"
        + (f"; without effect here: {', '.join(idle)}" if idle else ""),
        "This training would ignore it: leave it out, or choose a strategy that knows it.",
    )


def made_idle(config: Any) -> tuple[str, ...]:
    """Returns the beginnings of keys that another key of this config leaves nothing to say."""
    if config.train.method is Method.full:
        return ("lora.", "model.quantization", "model.double_quant")
    return ("model.double_quant",) if config.model.quantization is Quantization.none else ()


def rows_digest(lane: Lane, step: int) -> int:
    """Returns a number that stands for the rows of `step`, in their order, and what is in them."""
    rows = lane.budget.rows_of_step(step)
    digest = hashlib.sha256(rows.tobytes())
    digest.update(np.ascontiguousarray(lane.rows.tokens_BT[rows]).tobytes())
    digest.update(np.ascontiguousarray(lane.rows.trained_BT[rows]).tobytes())
    return int.from_bytes(digest.digest()[:7], "big")


def check_order(certificate: Certificate, kept: int, own: int, num_other: int, world_size: int) -> None:
    """Checks that the next step's rows are those that the checkpoint was to go on with, on every rank.

    Args:
        certificate: where it is noted.
        kept: what rank 0 read from the checkpoint, or found itself where there is none.
        own: what this rank would read.
        num_other: on how many ranks the two differ.
        world_size: the number of ranks.
    """
    certificate.require(
        "rows come in the recipe's order",
        num_other == 0,
        f"{num_other} of {world_size} ranks would go on with other rows (here {own:x}, to be {kept:x})"
        if num_other
        else f"the next rows are {kept:x} on {world_size} ranks",
        "Rows or NumPy are not those of the life before: restore them, or remove the checkpoints to begin anew.",
    )


def check_apart(certificate: Certificate, stepper: Stepper, lanes: Sequence[int]) -> None:
    """Checks that a lane's gradient on a row of its own is the same beside the other lanes as alone."""
    if len(lanes) < 2:
        return
    together = _gradients(stepper, lanes)
    mixed = []
    for k in lanes:
        alone = _gradients(stepper, [k])
        size = float(alone[k].norm())
        gap = float((together[k] - alone[k]).norm())
        spilled = sum(float(alone[other].norm()) for other in lanes if other != k)
        if math.isfinite(size) and (gap > APART * size or spilled):
            mixed.append(stepper.lanes[k].name)
    for k in lanes:
        gradient(stepper.lanes[k]).zero_()
    certificate.require(
        "each lane learns from its own rows alone",
        not mixed,
        f"{len(mixed)} of {len(lanes)} lanes have another gradient beside the others than alone"
        + (f": {', '.join(mixed[:3])}" if mixed else ""),
        "Rows met another lane's factors: train these adapters apart, and report it.",
    )


APART = 0.05
"""The relative difference of a gradient that bfloat16 products of other shapes explain; one row too many makes it 1."""


def _gradients(stepper: Stepper, lanes: Sequence[int]) -> dict[int, torch.Tensor]:
    """Returns every lane's gradient after one row of each of `lanes` was seen, together."""
    batches, seats = [], {}
    order = [k for k in stepper.seating.order if k in lanes]
    for place, k in enumerate(order):
        lane = stepper.lanes[k]
        rows = lane.budget.rows_of_step(0)
        first = rows[int(np.asarray(lane.rows.trained_BT[rows]).any(1).argmax())]
        batches.append(tensors(lane.rows, np.array([first])))
        seats[k] = slice(place, place + 1)
        stepper.seating.row_seeds[k] = row_seeds(lane, 0, range(1))
    for lane in stepper.lanes:
        gradient(lane).zero_()
    stepper.seating.rows = seats
    batch = {name: torch.cat([b[name] for b in batches]).to(stepper.strategy.device) for name in batches[0]}
    stepper.model(**batch).sum().backward()
    return {k: gradient(lane).clone() for k, lane in enumerate(stepper.lanes)}
