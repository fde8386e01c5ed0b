"""Loss on held-out rows: sums over tokens, so that no layout changes it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from qlora_dist.data.rows import Rows
from qlora_dist.errors import TrainError
from qlora_dist.train.batches import IGNORED, tensors
from qlora_dist.train.step import Stepper


def mean_loss(model: Any, rows: Rows, batch_tokens: int) -> float:
    """Returns the mean negative log-likelihood (nats) of the targets of `rows`; NaN where they have none.

    Raises:
        TrainError: if it isn't finite.
    """
    parameter = next(model.parameters())
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    batch_rows = max(1, batch_tokens // rows.row_tokens)
    with torch.inference_mode():
        for first in range(0, rows.num_rows, batch_rows):
            batch = tensors(rows, np.arange(first, min(first + batch_rows, rows.num_rows)))
            batch = {name: value.to(parameter.device) for name, value in batch.items()}
            labels_BT = batch.pop("labels")
            logits_BTV = model(**batch, use_cache=False).logits
            targets = labels_BT[:, 1:].reshape(-1)
            nll = cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum"
            )
            total, count = total + float(nll), count + int((targets != IGNORED).sum())
    model.train(was_training)
    if count and not math.isfinite(total):
        raise TrainError("The loss on held-out rows is not finite. Lower train.learning_rate.")
    return total / count if count else math.nan


def row_losses(stepper: Stepper, rows: Rows, batch_tokens: int, lane: int = 0) -> torch.Tensor:
    """Returns this rank's share of (summed loss, targets) of held-out rows under a lane, in float64.

    Every rank takes the same number of forwards, as a sharded base needs: short of rows, it does a row again for
    nothing.
    """
    strategy, totals = stepper.strategy, torch.zeros(2, dtype=torch.float64, device=stepper.strategy.device)
    batch_rows = max(1, batch_tokens // rows.row_tokens)
    stepper.model.eval()
    for first in range(0, rows.num_rows, batch_rows * strategy.world_size):
        start = first + strategy.rank * batch_rows
        indices = np.arange(start, min(start + batch_rows, rows.num_rows))
        idle = len(indices) == 0
        batch = {n: v.to(strategy.device) for n, v in tensors(rows, indices if not idle else np.array([0])).items()}
        stepper.seating.rows = {lane: slice(None)}
        with torch.no_grad():
            nll = stepper.model(**batch).sum()
        if not idle:
            totals += torch.stack([nll.double(), (batch["labels"] != IGNORED).sum().double()])
    stepper.model.train()
    return totals
