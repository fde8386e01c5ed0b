"""One training: its recipe and everything it reads, opened and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.config.fields import identity
from qlora_dist.config.model import Quantization
from qlora_dist.config.reading import watched
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import Method, check_step, check_supported
from qlora_dist.data.rows import Rows
from qlora_dist.errors import bad_value
from qlora_dist.model.adapter import Provenance
from qlora_dist.model.base import Base, open_base
from qlora_dist.model.kernels import check_kernels
from qlora_dist.model.weights import tokenizer_digest
from qlora_dist.runtime import Facts, log
from qlora_dist.train.batches import open_rows
from qlora_dist.train.budget import Budget, plan_budget
from qlora_dist.train.compiled import check_compiler


@dataclass(frozen=True, slots=True)
class Training:
    """What one adapter is trained from, and where it goes; `config` notes which of its keys are read."""

    config: AdapterConfig
    base: Base
    rows: Rows
    held_out: Rows | None
    budget: Budget
    tokenizer: Path
    out: Path
    identity: dict[str, Any]
    """What of the config is in the adapter's key."""

    @classmethod
    def open(cls, config: AdapterConfig, inputs: Mapping[str, Path], out: Path) -> Training:
        """Opens the inputs of stage `adapter`.

        Raises:
            TrainError: if the rows don't fit the base or the recipe.
            ConfigError: for a step that doesn't divide, a combination that no strategy does, kernels that can't run,
                rows that are longer than the base's positions.
        """
        check_step(config.train, config.strategy.world_size)
        check_supported(config.train, config.strategy)
        check_kernels(config.model)
        if config.train.compile:
            check_compiler()
        plain, config = config, watched(config)
        base, row_tokens = open_base(inputs["base"]), config.train.row_tokens
        check_positions(base, row_tokens)
        rows = open_rows(inputs["rows"], base, row_tokens)
        held_out = open_rows(inputs["validation"], base, row_tokens) if "validation" in inputs else None
        if held_out is not None and held_out.num_rows == 0:
            log.warning("%s: no held-out row, so no validation loss is measured", inputs["validation"])
            held_out = None
        budget = plan_budget(config.train, rows.num_rows, config.seed)
        return cls(config, base, rows, held_out, budget, inputs["tokenizer"], out, identity(plain))


def check_positions(base: Base, row_tokens: int) -> None:
    """Refuses rows with more slots than the base knows positions: it would train on what it can't tell apart.

    Raises:
        ConfigError: naming the most that it knows.
    """
    most = base.max_position_embeddings
    if most and row_tokens > most:
        wanted = f"at most {most}, the positions that {base.path} knows (max_position_embeddings)"
        raise bad_value("train.row_tokens", row_tokens, wanted, f"Set train.row_tokens={most} or less.")


def provenance(training: Training, validation_loss: float | None) -> Provenance:
    """Returns what this training was of, as it stands beside the weights."""
    config, base = training.config, training.base
    full = config.train.method is Method.full
    return Provenance(
        base_path=base.path,
        base_revision=base.revision,
        base_digest=base.digest,
        tokenizer_digest=tokenizer_digest(training.tokenizer),
        quantization=Quantization.none.name if full else config.model.quantization.name,
        dtype=config.model.compute_dtype.name,
        trained_tokens=training.budget.num_steps * config.train.tokens_per_step,
        validation_loss=validation_loss,
    )


def training_facts(training: Training, seconds: float, steps: int) -> Facts:
    """Returns what the manifest says of every training; `seconds` and `steps` are those of this life."""
    from qlora_dist.train.memory import peak_memory_bytes

    train, budget = training.config.train, training.budget
    tokens = budget.num_steps * train.tokens_per_step
    return {
        "num_rows": training.rows.num_rows,
        "num_steps": budget.num_steps,
        "tokens": tokens,
        "trained_share": round(float(training.rows.trained_BT.mean()), 6),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(steps * train.tokens_per_step / max(seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "full": train.method is Method.full,
        "world_size": training.config.strategy.world_size,
    }
