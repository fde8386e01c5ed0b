"""One training: its recipe and everything it reads, opened and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import check_step, check_supported
from qlora_dist.data.rows import Rows
from qlora_dist.model.base import Base, open_base
from qlora_dist.train.batches import open_rows
from qlora_dist.train.budget import Budget, plan_budget


@dataclass(frozen=True, slots=True)
class Training:
    """What one adapter is trained from, and where it goes."""

    config: AdapterConfig
    base: Base
    rows: Rows
    held_out: Rows | None
    budget: Budget
    tokenizer: Path
    out: Path

    @classmethod
    def open(cls, config: AdapterConfig, inputs: Mapping[str, Path], out: Path) -> Training:
        """Opens the inputs of stage `adapter`.

        Raises:
            TrainError: if the rows don't fit the base or the recipe.
        """
        check_step(config.train, config.strategy.world_size)
        check_supported(config.train, config.strategy)
        base, row_tokens = open_base(inputs["base"]), config.train.row_tokens
        rows = open_rows(inputs["rows"], base, row_tokens)
        held_out = open_rows(inputs["validation"], base, row_tokens) if "validation" in inputs else None
        budget = plan_budget(config.train, rows.num_rows, config.seed)
        return cls(config, base, rows, held_out, budget, inputs["tokenizer"], out)
