"""Stage `adapter`: one shard's rows and a frozen base become one adapter folder."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dist.config.model import Quantization
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import Method, check_step
from qlora_dist.data.rows import Rows
from qlora_dist.model.adapter import Provenance, save_adapter, write_provenance
from qlora_dist.model.base import Base, open_base
from qlora_dist.model.lora import num_trainable
from qlora_dist.model.weights import TOKENIZER_FILES, tokenizer_digest
from qlora_dist.runtime import Facts, JsonlSink, clear, quiet_libraries, sinks
from qlora_dist.train.batches import open_rows
from qlora_dist.train.budget import Budget, plan_budget
from qlora_dist.train.huggingface import train_with_trainer
from qlora_dist.train.validation import mean_loss

METRICS_FILE = "metrics.jsonl"


def train_adapter(config: AdapterConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Trains one adapter and leaves a folder that `PeftModel.from_pretrained` loads, with its metrics.

    Args:
        config: base, shape of the adapter, recipe, seed.
        inputs: `base`, `tokenizer`, `rows`, and `validation` (rows) where there are held-out records.
        out: where the folder's files go.

    Raises:
        TrainError: if the rows don't fit, or the loss doesn't stay finite.
    """
    quiet_libraries()
    check_step(config.train, config.strategy.world_size)
    base = open_base(inputs["base"])
    rows = open_rows(inputs["rows"], base, config.train.row_tokens)
    budget = plan_budget(config.train, rows.num_rows, config.seed)
    clear(out)
    started = time.monotonic()
    with sinks(JsonlSink(out / METRICS_FILE)):
        model = train_with_trainer(config, base, rows, budget)
    seconds = time.monotonic() - started
    save(config, base, model, inputs["tokenizer"], out)
    write_provenance(out, provenance(config, base, inputs["tokenizer"], budget))
    facts = training_facts(config, rows, budget, model, seconds)
    if "validation" in inputs:
        held_out = open_rows(inputs["validation"], base, config.train.row_tokens)
        facts["validation_loss"] = mean_loss(model, held_out, config.train.micro_batch_tokens)
    return facts


def save(config: AdapterConfig, base: Base, model: Any, tokenizer: Path, out: Path) -> None:
    """Writes the adapter, or for `train.method=full` the whole model and its tokenizer."""
    import torch

    if config.train.method is Method.lora:
        save_adapter(model, out, base)
        return
    model.to(getattr(torch, base.dtype)).save_pretrained(str(out))
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)


def provenance(config: AdapterConfig, base: Base, tokenizer: Path, budget: Budget) -> Provenance:
    """Returns what this training was of, as it stands beside the weights."""
    full = config.train.method is Method.full
    return Provenance(
        base_path=base.path,
        base_revision=base.revision,
        base_digest=base.digest,
        tokenizer_digest=tokenizer_digest(tokenizer),
        quantization=Quantization.none.name if full else config.model.quantization.name,
        dtype=config.model.compute_dtype.name,
        trained_tokens=budget.num_steps * config.train.tokens_per_step,
    )


def training_facts(config: AdapterConfig, rows: Rows, budget: Budget, model: Any, seconds: float) -> Facts:
    """Returns what the manifest says of this training."""
    tokens = budget.num_steps * config.train.tokens_per_step
    return {
        "num_rows": rows.num_rows,
        "num_steps": budget.num_steps,
        "tokens": tokens,
        "trained_share": round(float(rows.trained_BT.mean()), 6),
        "num_trainable": num_trainable(model),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "full": config.train.method is Method.full,
    }


def peak_memory_bytes() -> int:
    """Returns the most memory held so far: allocated on the GPU where there is one, else this process's own."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
