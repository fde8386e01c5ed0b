"""Likelihood on packed rows is kept as one sum a document; logits live for one chunk of targets only.

Letters: B rows of a batch, T slots of a row, N targets of a batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_dist.data.rows import Batch, Rows
from qlora_dist.errors import ModelError

if TYPE_CHECKING:
    import torch

LOGITS_AT_ONCE = 2**25
"""Logits formed at a time (128 MB in float32), whatever the batch and the vocabulary."""


@dataclass(frozen=True, slots=True)
class Slots:
    """What was found at each slot of some rows; all are 0 where a slot is no target.

    Negative log-likelihood (nats), the highest probability of any token, whether that token was the right one, and
    the divergence KL(base || model) of the whole distribution (nats; 0 unless it was asked for).
    """

    nll_BT: NDArray[np.float64]
    confidence_BT: NDArray[np.float64]
    correct_BT: NDArray[np.float64]
    kl_BT: NDArray[np.float64]


class TargetLoss:
    """Measures each target without ever forming all logits.

    The decoder runs once; its hidden states go through the vocabulary projection in chunks of targets.
    On the first batch a few targets are compared with the model's own logits, so a head that does more than
    project (and cap) is refused, not scored wrongly.

    Args:
        model: a causal language model, PEFT's wrapper or not.
        with_kl: measure the divergence from the model with its adapter switched off.
    """

    def __init__(self, model: Any, *, with_kl: bool = False) -> None:
        self._peft = model if hasattr(model, "get_base_model") else None
        self._causal = model.get_base_model() if self._peft is not None else model
        self._decoder = self._causal.get_decoder()
        self._head = self._causal.get_output_embeddings()
        self._cap = getattr(self._causal.config, "final_logit_softcapping", None)
        self._with_kl = with_kl and self._peft is not None
        self._checked = False

    def __call__(self, tokens_BT: torch.Tensor, trained_BT: torch.Tensor, position_BT: torch.Tensor) -> Slots:
        """Measures the targets of some rows, whose segments are told apart by their positions."""
        import torch

        is_target_BT = trained_BT.clone()
        is_target_BT[:, 0] = False  # nothing stands before the first slot
        with torch.inference_mode():
            hidden_NH = self._hidden(tokens_BT, is_target_BT, position_BT)
            if not self._checked and len(hidden_NH):
                self._check(tokens_BT, is_target_BT, position_BT, hidden_NH)
            found_4N = self._measure(hidden_NH, tokens_BT[is_target_BT])
            if self._with_kl:
                with self._without_adapter():
                    base_NH = self._hidden(tokens_BT, is_target_BT, position_BT)
                found_4N[3] = self._divergence(hidden_NH, base_NH)
        return Slots(*(_spread(values_N, is_target_BT) for values_N in found_4N))

    def _hidden(self, tokens_BT: torch.Tensor, is_target_BT: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states that predict the targets, [N, H]."""
        # No mask and no cache: only then do libraries keep packed segments apart by position.
        out = self._decoder(input_ids=tokens_BT, position_ids=position_BT, attention_mask=None, use_cache=False)
        hidden_NH: torch.Tensor = out.last_hidden_state[:, :-1][is_target_BT[:, 1:]]
        return hidden_NH

    def _chunk(self) -> int:
        return max(1, LOGITS_AT_ONCE // int(self._causal.config.vocab_size))

    def _measure(self, hidden_NH: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """Returns nll, confidence, correctness and zeros, [4, N]."""
        import torch

        found_4N = torch.zeros(4, len(target_N), device=target_N.device)
        size = self._chunk()
        for at in range(0, len(target_N), size):
            logits_CV, target_C = self._logits(hidden_NH[at : at + size]), target_N[at : at + size]
            total_C = logits_CV.logsumexp(-1)
            best_C, guess_C = logits_CV.max(-1)
            found_4N[0, at : at + size] = total_C - logits_CV.gather(1, target_C[:, None])[:, 0]
            found_4N[1, at : at + size] = (best_C - total_C).exp()
            found_4N[2, at : at + size] = (guess_C == target_C).float()
        return found_4N

    def _divergence(self, hidden_NH: torch.Tensor, base_NH: torch.Tensor) -> torch.Tensor:
        import torch

        parts, size = [hidden_NH.new_zeros(0, dtype=torch.float32)], self._chunk()
        for at in range(0, len(hidden_NH), size):
            logp_CV = self._logits(hidden_NH[at : at + size]).log_softmax(-1)
            with self._without_adapter():
                base_CV = self._logits(base_NH[at : at + size]).log_softmax(-1)
            parts.append((base_CV.exp() * (base_CV - logp_CV)).sum(-1))
        return torch.cat(parts)

    def _without_adapter(self) -> Any:
        assert self._peft is not None
        return self._peft.disable_adapter()

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        logits_NV: torch.Tensor = self._head(hidden_NH)
        if self._cap:
            logits_NV = (logits_NV / self._cap).tanh() * self._cap
        return logits_NV.float()

    def _check(
        self, tokens_BT: torch.Tensor, is_target_BT: torch.Tensor, position_BT: torch.Tensor, hidden_NH: torch.Tensor
    ) -> None:
        import torch

        row = int(is_target_BT.any(dim=1).nonzero()[0])
        slots = is_target_BT[row, 1:].nonzero()[:4, 0]
        own = self._causal(
            input_ids=tokens_BT[row : row + 1],
            position_ids=position_BT[row : row + 1],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=slots,
        ).logits[0]
        ours = self._logits(hidden_NH[: len(slots)])
        if not torch.isfinite(own).all():
            return  # a broken model: its sums say so, by document
        if not torch.allclose(own.float(), ours, rtol=0.05, atol=0.05 * float(own.float().std()) + 1e-3):
            kind = type(self._causal).__name__
            raise ModelError(
                f"{kind} does more with its logits than project hidden states: they differ by "
                f"{float((own.float() - ours).abs().max()):.3g}. Scoring needs a plain vocabulary projection."
            )
        self._checked = True


def _spread(values_N: torch.Tensor, is_target_BT: torch.Tensor) -> NDArray[np.float64]:
    import torch

    values_BT = torch.zeros(is_target_BT.shape, dtype=torch.float64)
    values_BT[is_target_BT.cpu()] = values_N.cpu().double()
    return values_BT.numpy()


def measure_rows(
    model: Any, rows: Rows, num_rows: int, batch_tokens: int, device: Any, *, with_kl: bool = False
) -> Iterator[tuple[NDArray[np.int64], Batch, Slots]]:
    """Yields (row numbers, the rows, what was found at their slots) of one batch after another."""
    import torch

    loss = TargetLoss(model, with_kl=with_kl)
    model.eval()
    size = max(1, batch_tokens // rows.row_tokens)
    for start in range(0, num_rows, size):
        index_B = np.arange(start, min(start + size, num_rows))
        batch = rows.batch(index_B)
        arrays = (batch.tokens_BT, np.ascontiguousarray(batch.trained_BT), batch.position_BT)
        yield index_B, batch, loss(*(torch.from_numpy(array).to(device) for array in arrays))
