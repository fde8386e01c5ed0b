"""Packed rows as the tensors a causal language model trains on.

B rows, T slots of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_dist.data.rows import Rows
from qlora_dist.errors import TrainError
from qlora_dist.model.base import Base

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a slot that isn't a target, as `cross_entropy` and transformers have it."""


def open_rows(folder: Path, base: Base, row_tokens: int) -> Rows:
    """Opens packed rows and checks that they fit the base and the recipe.

    Raises:
        TrainError: if their length isn't the recipe's, a token is beyond the base's vocabulary, or nothing is trained.
    """
    rows = Rows.open(folder)
    if rows.row_tokens != row_tokens:
        raise TrainError(f"{folder}: its rows hold {rows.row_tokens} tokens. Set train.row_tokens={rows.row_tokens}.")
    if rows.vocab_size > base.vocab_size:
        found = f"the rows' tokenizer has {rows.vocab_size} tokens, {base.path} has {base.vocab_size}"
        raise TrainError(f"{folder}: {found}. Make the rows with the base's own tokenizer.")
    if rows.num_rows and not np.asarray(rows.trained_BT).any():
        repair = "Check the records' responses and train.row_tokens: a response cut off leaves nothing to learn"
        raise TrainError(f"{folder}: no token is trained, so the loss would read 0. {repair}.")
    return rows


def tensors(rows: Rows, indices: np.ndarray) -> dict[str, torch.Tensor]:
    """Returns `input_ids`, `labels` and `position_ids` [B, T] of these rows.

    There is no attention mask on purpose: transformers keeps segments apart by `position_ids` that start again at
    0, and only where no mask is given.
    """
    import torch

    batch = rows.batch(indices)
    tokens_BT = torch.from_numpy(batch.tokens_BT.astype(np.int64))
    labels_BT = tokens_BT.masked_fill(~torch.from_numpy(np.ascontiguousarray(batch.trained_BT)), IGNORED)
    position_BT = torch.from_numpy(batch.position_BT.astype(np.int64))
    return {"input_ids": tokens_BT, "labels": labels_BT, "position_ids": position_BT}
