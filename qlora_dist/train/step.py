"""One optimizer step of every lane: micro-batches, one reduction over the ranks, clip, update.

Token sums travel, never means: each lane's gradient is divided by the step's number of targets over all ranks and
micro-steps, which every rank knows beforehand from the rows. So 1x8, 2x4 and 4x2 take the same step.
"""

from __future__ import annotations

import hashlib
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
    wants_stop: bool = False
    """Set on any rank (by a signal), it is seen by all of them at the end of the step."""

    def take(self, steps: Mapping[int, int], round: int = 0) -> dict[int, StepResult]:
        """Takes step `steps[k]` (0-based, each lane's own) of every lane k that it names; returns each one's result.

        `round` is where this rank tells the others that it is.
        """
        self.step = round
        counts = {k: num_targets(self.lanes[k], step) for k, step in steps.items()}
        nll_K = self.accumulate(steps, counts)
        self.reduce(list(steps), nll_K)
        return {k: update(self.lanes[k], step, float(nll_K[k]), counts[k]) for k, step in steps.items()}

    def accumulate(self, steps: Mapping[int, int], counts: Mapping[int, int]) -> torch.Tensor:
        """Adds up this rank's gradients over its micro-steps; returns each lane's summed loss on this rank."""
        nll_K = torch.zeros(len(self.lanes), device=self.strategy.device)
        for lane in (self.lanes[k] for k in counts):
            for parameter in lane.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        num_micro = {k: self._num_micro_steps(k) for k in counts}
        for micro in range(max(num_micro.values())):
            nll_B = self.model(**self._seat(steps, micro, [k for k in counts if micro < num_micro[k]]))
            sums = {k: nll_B[seats].sum() for k, seats in self.seating.rows.items()}
            torch.stack([nll / counts[k] for k, nll in sums.items()]).sum().backward()
            for k, nll in sums.items():
                nll_K[k] += nll.detach()
        return nll_K

    def reduce(self, active: list[int], nll_K: torch.Tensor) -> None:
        """Sums gradients, losses and the wish to stop over all ranks, in one message."""
        parameters = (p for k in active for p in self.lanes[k].parameters.values())
        note_place(self.step, is_waiting=True)
        grads = [p.grad for p in parameters if p.grad is not None]
        wish = torch.tensor([float(self.wants_stop)], device=self.strategy.device)
        self.strategy.sum_over_ranks([*grads, nll_K, wish])
        self.wants_stop = bool(wish.item() > 0)

    def _num_micro_steps(self, lane: int) -> int:
        train = self.lanes[lane].train
        return train.tokens_per_step // (train.micro_batch_tokens * self.strategy.world_size)

    def _seat(self, steps: Mapping[int, int], micro: int, active: list[int]) -> dict[str, torch.Tensor]:
        """Gathers the rows of one micro-step, lane after lane, and notes whose are where."""
        batches, first = [], 0
        self.seating.rows, self.seating.dropout_seeds = {}, {}
        for k in active:
            rows = rows_of_rank(self.lanes[k], steps[k], micro, self.strategy)
            batches.append(tensors(self.lanes[k].rows, rows))
            self.seating.rows[k] = slice(first, first + len(rows))
            self.seating.dropout_seeds[k] = dropout_seed(self.lanes[k].seed, steps[k], micro, self.strategy.rank)
            first += len(rows)
        return {name: torch.cat([b[name] for b in batches]).to(self.strategy.device) for name in batches[0]}


def update(lane: Lane, step: int, nll: float, count: int) -> StepResult:
    """Clips one lane's gradient and takes its optimizer step; every rank does the same on the same numbers."""
    assert lane.optimizer is not None
    rate = lane.train.learning_rate * lane.budget.rate_share(step, lane.train.schedule)
    for group in lane.optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(lane.parameters.values(), lane.train.max_grad_norm)
    lane.optimizer.step()
    return StepResult(loss=nll / count, grad_norm=float(norm), learning_rate=rate, num_targets=count)


def rows_of_rank(lane: Lane, step: int, micro: int, strategy: Strategy) -> np.ndarray:
    """Returns the rows of one rank in one micro-step: the step's rows dealt in order, micro-batch by micro-batch."""
    batch_rows = lane.train.micro_batch_tokens // lane.train.row_tokens
    first = (micro * strategy.world_size + strategy.rank) * batch_rows
    return lane.budget.rows_of_step(step)[first : first + batch_rows]


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


def dropout_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Returns the seed of one micro-step's masks, a function of its place in the training: nothing is to be saved."""
    digest = hashlib.sha256(f"{seed} {step} {micro} {rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
