"""Segments of packed rows, kept apart under FlashAttention, which is told where they begin rather than given a mask.

B rows, T slots of a row, S segments of all rows.
"""

from __future__ import annotations

from typing import Any

import torch


def keep_segments_apart(model: Any) -> Any:
    """Has a model tell FlashAttention where segments begin: where positions start again at 0, in each row of a batch.

    transformers looks for segments in batches of one row alone. In a larger batch it takes each row for one text, and
    tokens see the segments before theirs.

    Returns:
        The model, as it was where another attention runs.
    """
    if str(model.config._attn_implementation).startswith("flash_attention"):
        model.get_decoder().register_forward_pre_hook(_tell_lengths, with_kwargs=True)
    return model


def segment_starts(position_BT: torch.Tensor) -> torch.Tensor:
    """Returns where each segment of the flattened batch begins, and its end: int32 [S + 1]. A row begins a segment."""
    begins_BT = position_BT == 0
    begins_BT[:, 0] = True
    starts_S = begins_BT.flatten().nonzero().squeeze(1)
    return torch.cat([starts_S, starts_S.new_tensor([begins_BT.numel()])]).int()


def _tell_lengths(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    position_BT = kwargs.get("position_ids")
    if position_BT is None or any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values")):
        return args, kwargs
    starts, longest = segment_starts(position_BT), position_BT.shape[1]  # a bound: the longest itself costs a wait
    told = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return args, kwargs | told
