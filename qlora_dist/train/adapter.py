"""Stage `adapter`: one shard's rows and a frozen base become one adapter folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import Method, StrategyName
from qlora_dist.errors import QloraDistError
from qlora_dist.model.adapter import save_adapter, write_provenance
from qlora_dist.model.lora import num_trainable
from qlora_dist.model.weights import TOKENIZER_FILES
from qlora_dist.runtime import Facts, JsonlSink, clear, quiet_libraries, sinks
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.training import Training, provenance, training_facts

if TYPE_CHECKING:
    from qlora_dist.train.meeting import Meeting

METRICS_FILE = "metrics.jsonl"
LANE = "adapter"
"""The name of the only lane, in what is said of it."""


def train_adapter(
    config: AdapterConfig, inputs: Mapping[str, Path], out: Path, meeting: Meeting | None = None
) -> Facts:
    """Trains one adapter and leaves a folder that `PeftModel.from_pretrained` loads, with its metrics.

    With several processes it runs on each of them, and rank 0 alone writes to `out`.

    Args:
        config: base, shape of the adapter, recipe, seed.
        inputs: `base`, `tokenizer`, `rows`, and `validation` (rows) where there are held-out records.
        out: where the folder's files go; checkpoints of an earlier life there are continued.
        meeting: where this training meets others that it is averaged with; not with `strategy=single`.

    Raises:
        TrainError: if the rows don't fit, the loss doesn't stay finite, or a check of the certificate fails.
        Preempted: after SIGTERM or SIGUSR2, once a checkpoint is written (not with `strategy=single`).
    """
    quiet_libraries()
    training = Training.open(config, inputs, out)
    return _train_single(training) if config.strategy.name is StrategyName.single else _train_lane(training, meeting)


def _train_single(training: Training) -> Facts:
    from qlora_dist.train.huggingface import recomputes_alone, train_with_trainer
    from qlora_dist.train.validation import mean_loss

    clear(training.out)
    started = time.monotonic()
    certificate, recomputes = Certificate(), recomputes_alone(training)
    with sinks(JsonlSink(training.out / METRICS_FILE)):
        model = train_with_trainer(training, certificate, recomputes)
    facts: Facts = {"num_trainable": num_trainable(model), "activation_checkpointing": "on" if recomputes else "off"}
    if training.held_out is not None:
        facts["validation_loss"] = mean_loss(model, training.held_out, training.config.train.micro_batch_tokens)
    save(training, model, certificate)
    facts["certificate"] = certificate.table()
    write_provenance(training.out, provenance(training, facts.get("validation_loss")))
    return facts | training_facts(training, time.monotonic() - started, training.budget.num_steps)


def _train_lane(training: Training, meeting: Meeting | None) -> Facts:
    from qlora_dist.train.joint import train_lanes

    made = train_lanes({LANE: training}, solo=True, meeting=meeting)[LANE]
    if isinstance(made, QloraDistError):
        raise made
    return made


def save(training: Training, model: Any, certificate: Certificate) -> None:
    """Writes the adapter and checks it, or for `train.method=full` the whole model and its tokenizer."""
    import torch
    from peft import get_peft_model_state_dict

    from qlora_dist.train.adapter_file import check_saved

    base, out = training.base, training.out
    if training.config.train.method is Method.lora:
        save_adapter(model, out, base)
        check_saved(certificate, get_peft_model_state_dict(model), training.config.lora.lora_rank, out)
        return
    model.to(getattr(torch, base.dtype)).save_pretrained(str(out))
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (training.tokenizer / name).exists():
            shutil.copyfile(training.tokenizer / name, out / name)
