"""`strategy=single`: what a Hugging Face user would write, and nothing more.

BitsAndBytesConfig, LoraConfig, get_peft_model and transformers.Trainer, on packed rows.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_dist.config.model import Dtype
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import Checkpointing, Method, TrainConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import bad_value
from qlora_dist.model.base import load_model
from qlora_dist.model.kernels import use_kernels
from qlora_dist.model.lora import attach_lora
from qlora_dist.runtime import Progress, device, log, log_metrics, set_seed
from qlora_dist.train.batches import tensors
from qlora_dist.train.budget import Budget
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.examination import Examination
from qlora_dist.train.first_steps import check_finite
from qlora_dist.train.memory import free_memory_bytes
from qlora_dist.train.moments import adamw
from qlora_dist.train.strategies.choice import FITS, standard_bytes
from qlora_dist.train.training import Training

LOGGED: tuple[str, ...] = ("loss", "learning_rate", "grad_norm")


def train_with_trainer(training: Training, certificate: Certificate, recomputes: bool = False) -> Any:
    """Returns the trained model, a PEFT model or for `train.method=full` the whole base, and notes what was checked.

    The same config, rows and seed give the same weights to the bit on one CPU with one number of threads.

    Raises:
        TrainError: at the first step whose loss or gradient is not finite.
    """
    import torch
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    config, base, budget = training.config, training.base, training.budget
    set_seed(config.seed)  # before the factors are drawn
    if config.train.method is Method.full:
        model = load_model(base, config.model, dtype=torch.float32, quantized=False)
    else:
        model = attach_lora(load_model(base, config.model), config.lora)
    use_kernels(model, config.model)
    examination = Examination(certificate, training, model)
    examination.before()
    with tempfile.TemporaryDirectory() as unused:
        trainer = Trainer(
            model=model,
            args=training_arguments(config, budget, Path(unused), recomputes),
            train_dataset=OrderedRows(training.rows, budget),
            optimizers=optimizer_and_schedule(model, config.train, budget),
            callbacks=[metrics_callback(config, budget, certificate), examination.callback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    examination.after()
    return model


def recomputes_alone(training: Training) -> bool:
    """Says whether the Trainer computes activations again: as the config has it, with `auto` where they don't fit."""
    asked = training.config.train.activation_checkpointing
    if asked is not Checkpointing.auto:
        return asked is Checkpointing.on
    needed = standard_bytes(training.config, training.base)
    answer = needed > FITS * free_memory_bytes()
    log.info("activation_checkpointing=auto: %s, since off needs %.2f GB", "on" if answer else "off", needed / 1e9)
    return answer


def training_arguments(config: AdapterConfig, budget: Budget, folder: Path, recomputes: bool = False) -> Any:
    """Returns the recipe in the Trainer's words; the rows come in their order already, so it must not shuffle."""
    from transformers import TrainingArguments

    train, dtype = config.train, config.model.compute_dtype
    if dtype is Dtype.float16 and device().type == "cpu":
        raise bad_value("model.compute_dtype", "float16", "bfloat16 or float32 on a CPU")
    batch_rows = train.micro_batch_tokens // train.row_tokens
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_rows,
        gradient_accumulation_steps=budget.rows_per_step // batch_rows,
        max_steps=budget.num_steps,
        train_sampling_strategy="sequential",
        max_grad_norm=train.max_grad_norm,
        bf16=dtype is Dtype.bfloat16,
        fp16=dtype is Dtype.float16,
        activation_checkpointing=recomputes,
        use_cpu=device().type == "cpu",
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device().type == "cuda",
    )
    if arguments.n_gpu > 1:  # else the Trainer takes all that it sees, and as many times the batch
        arguments._n_gpu = 1
    return arguments


def optimizer_and_schedule(model: Any, train: TrainConfig, budget: Budget) -> tuple[Any, Any]:
    """Returns AdamW over what is trained, and the recipe's schedule: transformers' own wastes step 1 at a rate of 0."""
    from torch.optim.lr_scheduler import LambdaLR

    optimizer = adamw(train, [p for p in model.parameters() if p.requires_grad])
    return optimizer, LambdaLR(optimizer, lambda step: budget.rate_share(step, train.schedule))


class OrderedRows:
    """The whole training as one map-style dataset: item i is the i-th row that is trained on."""

    def __init__(self, rows: Rows, budget: Budget) -> None:
        import numpy as np

        self._rows = rows
        self._order = np.concatenate([budget.rows_of_step(step) for step in range(budget.num_steps)])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in tensors(self._rows, self._order[[index]]).items()}


def metrics_callback(config: AdapterConfig, budget: Budget, certificate: Certificate) -> Any:
    """Returns a callback that sends the Trainer's logs to this project's sinks, and stops at a loss of no value."""
    from transformers import TrainerCallback

    class Metrics(TrainerCallback):
        progress = Progress(budget.num_steps)
        started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()
            self.progress.update(0)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            step = state.global_step
            values = {name: float(logs[name]) for name in LOGGED if name in logs}
            check_finite(certificate, step, values)
            elapsed = max(time.monotonic() - self.started, 1e-9)
            values["tokens_per_s"] = step * config.train.tokens_per_step / elapsed
            self.progress.update(step, **values)
            if step % config.train.log_every_steps == 0 or step == budget.num_steps:
                log_metrics(step, values)

    return Metrics()
