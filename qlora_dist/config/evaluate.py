"""What is measured of a model, and where runs are logged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import execution, setting


class TrackingName(Enum):
    """Where training curves go besides the run's own files."""

    offline = "offline"
    wandb = "wandb"
    none = "none"


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Which held-out split is scored, and how much of it."""

    split: str = "test"
    max_rows: int = setting(0, at_least=0)
    batch_tokens: int = execution(4096, at_least=8)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """The tracker, and the project that runs are filed under."""

    name: TrackingName = execution(TrackingName.offline)
    project: str = execution("qlora_dist")
