"""Loss on held-out rows: sums over tokens, so that no layout changes it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qlora_dist.data.rows import Rows
from qlora_dist.errors import TrainError
from qlora_dist.train.batches import IGNORED, tensors


def mean_loss(model: Any, rows: Rows, batch_tokens: int) -> float:
    """Returns the mean negative log-likelihood (nats) of the targets of `rows`; NaN where they have none.

    Raises:
        TrainError: if it isn't finite.
    """
    import torch
    from torch.nn.functional import cross_entropy

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
