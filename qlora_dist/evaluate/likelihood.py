"""Likelihood on packed rows is kept as one sum a document; logits live for one chunk of targets only.

Letters: B rows of a batch, T slots of a row, N targets of a batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_dist.data.rows import Rows
from qlora_dist.errors import ModelError

if TYPE_CHECKING:
    import torch

LOGITS_AT_ONCE = 2**25
"""Logits formed at a time (128 MB in float32), whatever the batch and the vocabulary."""


class TargetLoss:
    """Computes each target's negative log-likelihood in nats, without ever forming all logits.

    The decoder runs once; its hidden states go through the vocabulary projection in chunks of targets.
    On the first batch a few targets are compared with the model's own logits, so a head that does more than
    project (and cap) is refused, not scored wrongly.
    """

    def __init__(self, model: Any) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._causal = causal
        self._decoder = causal.get_decoder()
        self._head = causal.get_output_embeddings()
        self._cap = getattr(causal.config, "final_logit_softcapping", None)
        self._checked = False

    def __call__(self, tokens_BT: torch.Tensor, trained_BT: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        """Returns nll_BT in float32: 0 where a slot is no target. Segments are told apart by their positions."""
        import torch

        with torch.inference_mode():
            # No mask and no cache: only then do libraries keep packed segments apart by position.
            out = self._decoder(input_ids=tokens_BT, position_ids=position_BT, attention_mask=None, use_cache=False)
            hidden_NH = out.last_hidden_state[:, :-1][trained_BT[:, 1:]]
            target_N = tokens_BT[:, 1:][trained_BT[:, 1:]]
            if not self._checked and len(target_N):
                self._check(tokens_BT, trained_BT, position_BT, hidden_NH)
            nll_BT = torch.zeros(tokens_BT.shape, dtype=torch.float32, device=tokens_BT.device)
            nll_BT[:, 1:][trained_BT[:, 1:]] = self._nll(hidden_NH, target_N)
        return nll_BT

    def _nll(self, hidden_NH: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        import torch

        size = max(1, LOGITS_AT_ONCE // self._causal.config.vocab_size)
        chunks = zip(hidden_NH.split(size), target_N.split(size), strict=True)
        parts = [torch.nn.functional.cross_entropy(self._logits(h), t, reduction="none") for h, t in chunks]
        return torch.cat(parts) if parts else hidden_NH.new_zeros(0, dtype=torch.float32)

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        logits_NV: torch.Tensor = self._head(hidden_NH)
        if self._cap:
            logits_NV = (logits_NV / self._cap).tanh() * self._cap
        return logits_NV.float()

    def _check(
        self, tokens_BT: torch.Tensor, trained_BT: torch.Tensor, position_BT: torch.Tensor, hidden_NH: torch.Tensor
    ) -> None:
        import torch

        row = int(trained_BT[:, 1:].any(dim=1).nonzero()[0])
        slots = trained_BT[row, 1:].nonzero()[:4, 0]
        own = self._causal(
            input_ids=tokens_BT[row : row + 1],
            position_ids=position_BT[row : row + 1],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=slots,
        ).logits[0]
        ours = self._logits(hidden_NH[: len(slots)])
        if not torch.allclose(own.float(), ours, rtol=0.05, atol=0.05 * float(own.float().std()) + 1e-3):
            kind = type(self._causal).__name__
            raise ModelError(
                f"{kind} does more with its logits than project hidden states: they differ by "
                f"{float((own.float() - ours).abs().max()):.3g}. Scoring needs a plain vocabulary projection."
            )
        self._checked = True


def nll_of_rows(
    model: Any, rows: Rows, num_rows: int, batch_tokens: int, device: Any
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[Any], NDArray[Any]]]:
    """Yields (row indices, nll_BT in nats, tokens_BT, trained_BT) of one batch after another."""
    import torch

    loss = TargetLoss(model)
    model.eval()
    size = max(1, batch_tokens // rows.row_tokens)
    for start in range(0, num_rows, size):
        index_B = np.arange(start, min(start + size, num_rows))
        batch = rows.batch(index_B)
        tokens_BT, trained_BT = np.asarray(batch.tokens_BT), np.asarray(batch.trained_BT)
        position_BT = np.asarray(batch.position_BT)
        nll_BT = loss(
            torch.from_numpy(tokens_BT.astype(np.int64)).to(device),
            torch.from_numpy(trained_BT.astype(bool)).to(device),
            torch.from_numpy(position_BT.astype(np.int64)).to(device),
        )
        yield index_B, nll_BT.cpu().numpy().astype(np.float64), tokens_BT, trained_BT
