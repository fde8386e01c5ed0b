"""Token losses without the table of all logits: computed in chunks, for slots that are targets only.

Shape letters: B rows, T slots, N targets of the batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from qlora_dist.train.batches import IGNORED

CHUNK_VALUES = 1 << 26
"""Logits held at once (N x V values; in float32, 256 MiB)."""


class LaneModel(nn.Module):
    """A causal language model that returns the summed loss of each row instead of logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._chunked = not any(getattr(model.config, name, None) for name in SCALED_LOGITS)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, whole_logits: bool = False
    ) -> torch.Tensor:
        """Returns nll_B: the negative log-likelihood (nats, float32) summed over each row's targets."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        targets_BT = labels[:, 1:]
        # Found once: on a GPU each search for targets waits for all that was asked of it before.
        row_N, slot_N = (targets_BT != IGNORED).nonzero(as_tuple=True)
        targets_N = targets_BT[row_N, slot_N]
        if self._chunked and not whole_logits:
            decoder = getattr(self.model, self.model.base_model_prefix)
            hidden_NH = decoder(**inputs).last_hidden_state[row_N, slot_N]
            nll_N = chunked_nll(hidden_NH, self.model.get_output_embeddings(), targets_N)
        else:
            logits_NV = self.model(**inputs).logits[row_N, slot_N]
            nll_N = cross_entropy(logits_NV.float(), targets_N, reduction="none")
        return torch.zeros(len(labels), device=nll_N.device).index_add(0, row_N, nll_N)


SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""Config fields of architectures that change logits after the head: their own forward is used, logits whole."""


def chunked_nll(hidden_NH: torch.Tensor, head: nn.Linear, targets_N: torch.Tensor) -> torch.Tensor:
    """Returns nll_N (float32) of the targets under softmax(hidden W^T); the head is frozen."""
    nll_N: torch.Tensor = _ChunkedNll.apply(hidden_NH, head.weight, head.bias, targets_N)
    return nll_N


class _ChunkedNll(torch.autograd.Function):
    """Computes the gradient to the hidden states in the forward pass, chunk by chunk, and keeps only that."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, W_VH: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
    ) -> torch.Tensor:
        step = max(1, CHUNK_VALUES // W_VH.shape[0])
        nll_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        wants_gradient = ctx.needs_input_grad[0]
        grad_NH = torch.empty_like(hidden_NH) if wants_gradient else None
        for start in range(0, len(targets_N), step):
            part = slice(start, start + step)
            logits_NV = nn.functional.linear(hidden_NH[part], W_VH, bias_V).float()
            log_z_N = logits_NV.logsumexp(-1)
            index_N1 = targets_N[part, None]
            nll_N[part] = log_z_N - logits_NV.gather(1, index_N1).squeeze(1)
            if grad_NH is not None:
                slope_NV = logits_NV.sub_(log_z_N[:, None]).exp_()
                slope_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1, dtype=slope_NV.dtype))
                grad_NH[part] = slope_NV.to(W_VH.dtype) @ W_VH
        ctx.save_for_backward(*([grad_NH] if grad_NH is not None else []))
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * grads[0][:, None]).to(grad_NH.dtype), None, None, None
