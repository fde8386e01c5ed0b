"""What is measured of a model, and where runs are logged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import execution, setting


class TrackingName(Enum):
    """Where training curves go besides the run's own files."""

    offline = "offline"
    wandb = "wandb"
    tensorboard = "tensorboard"
    none = "none"


class Gate(Enum):
    """What follows from the ship/no-ship verdict: nothing, a line in the report, or exit code 3."""

    off = "off"
    report = "report"
    strict = "strict"


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Which held-out split is scored and how much of it, how many questions are put, what a model must reach.

    Up to `models_per_job` models are scored in one job, on one loaded base.
    `min_gain` and `max_forgetting` are in bits per byte, against the base: on each domain, and on `general`.
    `min_scores` names shares that the shipped model must reach on each domain that has them
    (`+evaluate.min_scores.schema_valid=0.95`).
    """

    split: str = "test"
    max_rows: int = setting(0, at_least=0)
    max_answers: int = setting(32, at_least=0)
    max_new_tokens: int = setting(64, at_least=1)
    lm_eval_tasks: list[str] = setting(list)
    lm_eval_folder: str = execution("")
    batch_tokens: int = execution(4096, at_least=8)
    models_per_job: int = execution(16, at_least=1)
    gate: Gate = execution(Gate.report)
    min_gain: float = execution(0.0, at_least=0)
    max_forgetting: float = execution(0.1, at_least=0)
    min_scores: dict[str, float] = execution(dict, at_least=0)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """The tracker, and the project that runs are filed under."""

    name: TrackingName = execution(TrackingName.offline)
    project: str = execution("qlora_dist")
