"""One optimizer step of every lane: micro-batches, one reduction over the ranks, clip, update.

Token sums travel, never means: each lane's gradient is divided by the step's number of targets over all ranks and
micro-steps, which every rank knows beforehand from the rows. So 1x8, 2x4 and 4x2 take the same step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qlora_dist.errors import TrainError
from qlora_dist.train.batches import tensors
from qlora_dist.train.lanes import Lane, Seating
from qlora_dist.train.loss import LaneModel
from qlora_dist.train.processes import note_place
from qlora_dist.train.strategies import Strategy


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one lane's step came to: mean loss over its targets, gradient norm before the clip, learning rate."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_targets: int


@dataclass(slots=True)
class Stepper:
    """Takes optimizer steps of all lanes on this rank, in step with the others."""

    model: LaneModel
    lanes: list[Lane]
    seating: Seating
    strategy: Strategy
    step: int = 0
    asked_to_stop: bool = False
    """Set on this rank alone, at any moment: by a signal."""
    wants_stop: bool = False
    """What all ranks agreed on at the end of the step: that one of them was asked to."""

    def take(self, steps: Mapping[int, int], turn: int = 0) -> dict[int, StepResult]:
        """Takes step `steps[k]` (0-based, each lane's own) of every lane k that it names; returns each one's result.

        A lane whose loss or gradient isn't finite stays as it was before the step: the result says so, and whoever
        drives the steps ends it. The others don't notice. `turn` is where this rank tells the others that it is.
        """
        self.step = turn
        counts = {k: num_targets(self.lanes[k], step) for k, step in steps.items()}
        nll_K = self.accumulate(steps, counts)
        self.reduce(list(steps), nll_K)
        norms = torch._foreach_norm([gradient(self.lanes[k]) for k in steps])
        found = torch.stack([torch.stack(list(norms)).float(), nll_K[list(steps)]]).tolist()
        results = {}
        for (k, step), norm, nll in zip(steps.items(), *found, strict=True):
            lane = self.lanes[k]
            rate = lane.train.learning_rate * lane.budget.rate_share(step, lane.train.schedule)
            results[k] = StepResult(nll / counts[k], norm, rate, counts[k])
            if math.isfinite(nll) and math.isfinite(norm):
                update(lane, rate, norm)
        return results

    def accumulate(self, steps: Mapping[int, int], counts: Mapping[int, int]) -> torch.Tensor:
        """Adds up this rank's gradients over its micro-steps; returns each lane's summed loss on this rank."""
        nll_K = torch.zeros(len(self.lanes), device=self.strategy.device)
        shares = {k: self._share(count) for k, count in counts.items()}
        for k in counts:
            gradient(self.lanes[k]).zero_()
        num_micro = {k: self._num_micro_steps(k) for k in self.seating.order if k in counts}
        for micro in range(max(num_micro.values())):
            nll_B = self.model(**self._seat(steps, micro, [k for k, number in num_micro.items() if micro < number]))
            sizes = [seats.stop - seats.start for seats in self.seating.rows.values()]
            lane_B = torch.tensor([k for k, size in zip(self.seating.rows, sizes, strict=True) for _ in range(size)])
            share_B = torch.tensor([shares[int(k)] for k in lane_B])
            (nll_B * share_B.to(nll_B.device)).sum().backward()
            nll_K.index_add_(0, lane_B.to(nll_K.device), nll_B.detach())
        for k, count in counts.items():
            if (scale := shares[k] * count) != 1:
                gradient(self.lanes[k]).div_(scale)
        return nll_K

    def _share(self, count: int) -> float:
        """Returns what each target's loss weighs while gradients flow: its share of the step's `count` of them.

        In float16, whose numbers end at 6e-8, a small share of a small gradient is nothing. There all shares of a
        lane are multiplied by a power of two, near 1, and the float32 sums are divided by it: no bit is lost.
        """
        small = self.model.model.dtype == torch.float16
        return (2.0 ** math.floor(math.log2(count)) if small else 1) / count

    def reduce(self, active: list[int], nll_K: torch.Tensor) -> None:
        """Sums gradients, losses and the wish to stop over all ranks, in one message."""
        note_place(self.step, is_waiting=True)
        grads = [gradient(self.lanes[k]) for k in active]
        wish = torch.tensor([float(self.asked_to_stop)], device=self.strategy.device)
        self.strategy.sum_over_ranks([*grads, nll_K, wish])
        self.wants_stop = bool(wish.item() > 0)

    def _num_micro_steps(self, lane: int) -> int:
        train = self.lanes[lane].train
        return train.tokens_per_step // (train.micro_batch_tokens * self.strategy.world_size)

    def _seat(self, steps: Mapping[int, int], micro: int, active: list[int]) -> dict[str, torch.Tensor]:
        """Gathers the rows of one micro-step, lane after lane, and notes whose are where."""
        batches, seats, first = [], {}, 0
        for k in active:
            lane = self.lanes[k]
            start, rows = rows_of_rank(lane, steps[k], micro, self.strategy)
            batches.append(tensors(lane.rows, rows))
            seats[k] = slice(first, first + len(rows))
            self.seating.row_seeds[k] = row_seeds(lane, steps[k], range(start, start + len(rows)))
            first += len(rows)
        self.seating.rows = seats
        return {name: torch.cat([b[name] for b in batches]).to(self.strategy.device) for name in batches[0]}


def gradient(lane: Lane) -> torch.Tensor:
    """Returns the lane's whole gradient [P], live."""
    assert lane.values_P.grad is not None
    return lane.values_P.grad


def update(lane: Lane, rate: float, norm: float) -> None:
    """Clips one lane's gradient and takes its optimizer step; every rank does the same on the same numbers."""
    assert lane.optimizer is not None
    if norm > lane.train.max_grad_norm:
        gradient(lane).mul_(lane.train.max_grad_norm / (norm + 1e-6))
    for group in lane.optimizer.param_groups:
        group["lr"] = rate
    lane.optimizer.step()


def rows_of_rank(lane: Lane, step: int, micro: int, strategy: Strategy) -> tuple[int, np.ndarray]:
    """Returns the rows of one rank in one micro-step, and the place of the first one in the step.

    The step's rows are dealt in order, micro-batch by micro-batch.
    """
    batch_rows = lane.train.micro_batch_tokens // lane.train.row_tokens
    first = (micro * strategy.world_size + strategy.rank) * batch_rows
    return first, lane.budget.rows_of_step(step)[first : first + batch_rows]


def num_targets(lane: Lane, step: int) -> int:
    """Returns how many targets all ranks together see in one step of a lane.

    Raises:
        TrainError: if there is none.
    """
    count = int(lane.rows.trained_BT[lane.budget.rows_of_step(step)].sum())
    if count == 0:
        repair = "Raise train.tokens_per_step, or check that the records' responses are not cut off"
        raise TrainError(f"{lane.name}: step {step + 1} has no trained token, so its loss would read 0. {repair}.")
    return count


def row_seeds(lane: Lane, step: int, places: range) -> list[int]:
    """Returns the seeds of some rows' dropout masks: functions of their places in the step, the same in any layout."""
    if lane.lora.lora_dropout == 0:
        return []
    digests = (hashlib.sha256(f"{lane.seed} {step} {place}".encode()).digest() for place in places)
    return [int.from_bytes(digest[:7], "big") for digest in digests]
