"""The certificate of `strategy=single`: the same checks, made of a PEFT model in the hands of transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_dist.config.train import Method
from qlora_dist.train.batches import IGNORED
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.checks import (
    base_fingerprint,
    check_dtypes,
    check_no_leak,
    check_rows,
    check_storage,
    check_unchanged,
    twice,
)
from qlora_dist.train.first_steps import Watch, check_read
from qlora_dist.train.training import Training


@dataclass(slots=True)
class Examination:
    """What is checked of a standard training before it, at its first two steps, and after it.

    With `train.method=full` there is no frozen base: what is trained is all there is.
    """

    certificate: Certificate
    training: Training
    model: Any
    _fingerprint: list[int] = field(default_factory=list)
    _watch: Watch | None = None

    def before(self) -> None:
        """Checks rows, dtypes, storage and attention."""
        config, rows = self.training.config, self.training.rows
        device = next(self.model.parameters()).device
        check_rows(self.certificate, rows, self.training.budget)
        check_no_leak(self.certificate, rows, device, self._probe)
        if config.train.method is Method.full:
            return
        from peft.tuners.lora import LoraLayer

        check_dtypes(self.certificate, self.model, getattr(torch, config.model.compute_dtype.name))
        adapted = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        four_bit = sum(hasattr(module.get_base_layer(), "quant_state") for module in adapted)
        check_storage(self.certificate, four_bit, len(adapted), config.model)
        self._fingerprint = base_fingerprint(self.model)

    def after(self) -> None:
        """Checks that the base is what it was."""
        if self._fingerprint:
            check_unchanged(self.certificate, self._fingerprint, base_fingerprint(self.model))

    def watch(self, is_first: bool) -> None:
        """Notes the weights before a step."""
        self._watch = Watch({n: p for n, p in self.model.named_parameters() if p.requires_grad}, is_first)

    def look(self, is_first: bool) -> None:
        """Checks that they moved, and after the first step that the config was read."""
        assert self._watch is not None
        self._watch.check(self.certificate)
        self._watch = None
        if is_first:
            check_read(self.certificate, self.training.config, is_alone=True)

    def callback(self) -> Any:
        """Returns the Trainer's callback that looks at the first two steps."""
        from transformers import TrainerCallback

        examination = self

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step < 2:
                    examination.watch(is_first=state.global_step == 0)

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step < 2:
                    examination.look(is_first=state.global_step == 0)

        return Look()

    def _probe(self, batch: dict[str, torch.Tensor]) -> float:
        """Returns the summed loss of a batch: factors B are zero before the first step, so it is the base's."""
        train = self.training.config.train
        batch = twice(batch) if train.micro_batch_tokens > train.row_tokens else batch
        labels_BT = batch["labels"]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            logits = self.model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        self.model.train(was_training)
        targets = labels_BT[:, 1:].reshape(-1)
        flat = logits[:, :-1].flatten(0, 1).float()
        return float(torch.nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum"))
