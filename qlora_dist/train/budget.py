"""How many steps a recipe takes, and which rows each one sees: a pure function of recipe and seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qlora_dist.config.train import Schedule, TrainConfig
from qlora_dist.data.rows import row_order
from qlora_dist.errors import TrainError


@dataclass(frozen=True, slots=True)
class Budget:
    """The steps of one training: `rows_per_step` global rows each, whatever the number of ranks."""

    num_rows: int
    rows_per_step: int
    num_steps: int
    num_warmup_steps: int
    seed: int

    def rows_of_step(self, step: int) -> np.ndarray:
        """Returns the global row indices of `step` (0-based), in order; epochs follow each other without a gap."""
        first = step * self.rows_per_step
        wanted = np.arange(first, first + self.rows_per_step)
        epochs, places = wanted // self.num_rows, wanted % self.num_rows
        taken = [_order(self.num_rows, self.seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(taken).astype(np.int64)

    def rate_share(self, step: int, schedule: Schedule) -> float:
        """Returns the share of the peak learning rate at `step` (0-based): linear warm-up, then the schedule.

        The first step of a warm-up of W takes 1/W of the peak, and the last step of the training is above 0: no step
        is wasted.
        """
        if step < self.num_warmup_steps:
            return (step + 1) / (self.num_warmup_steps + 1)
        through = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        if schedule is Schedule.cosine:
            return 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))
        return 1.0 if schedule is Schedule.constant else max(0.0, 1.0 - through)


@lru_cache(maxsize=64)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return row_order(num_rows, seed, epoch)


def plan_budget(train: TrainConfig, num_rows: int, seed: int) -> Budget:
    """Derives the number of steps from the token budget: whole steps, as near to `epochs` as they come.

    Raises:
        TrainError: if there is no row to train on.
    """
    if num_rows == 0:
        raise TrainError("There is no row to train on. Give the domain more text, or fewer shards.")
    rows_per_step = train.tokens_per_step // train.row_tokens
    num_steps = max(1, round(train.epochs * num_rows / rows_per_step))
    if train.max_steps:
        num_steps = min(num_steps, train.max_steps)
    warmup = min(round(train.warmup_share * num_steps), num_steps - 1)
    return Budget(num_rows, rows_per_step, num_steps, warmup, seed)
