"""The table of contents: every stage, the config it is told, and the function that does its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qlora_dist.config import stages as told
from qlora_dist.errors import QloraDistError
from qlora_dist.runtime import Facts

StageFunction = Callable[[Any, Mapping[str, Path], Path], Facts]
JointFunction = Callable[
    [Mapping[str, Any], Mapping[str, Mapping[str, Path]], Mapping[str, Path]], Mapping[str, Facts | QloraDistError]
]
"""Makes several nodes of one stage at once: configs, inputs and output folders by label; answers by label with the
facts, or with the error that ended that one alone."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One kind of work. `version` is raised by hand when its function makes other bytes of the same recipe.

    Nodes of a stage that `meets` wait for each other, so they should run at the same time. A stage that `spreads` uses
    all the cores that it is given, and makes the same bytes with any number of them.
    """

    name: str
    config: type
    function: str
    version: int = 1
    joint: str = ""
    loads_model: bool = False
    resumes: bool = False
    meets: bool = False
    spreads: bool = False
    names: tuple[str, ...] = ()

    def load(self) -> StageFunction:
        """Imports the stage's function, and with it the libraries it needs."""
        module, name = self.function.split(":")
        function: StageFunction = getattr(import_module(module), name)
        return function

    def load_joint(self) -> JointFunction:
        """Imports the function that makes several nodes of one group at once."""
        module, name = self.joint.split(":")
        function: JointFunction = getattr(import_module(module), name)
        return function


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("records", told.RecordsConfig, "qlora_dist.data.records:write_records", version=4),
        Stage("splits", told.SplitsConfig, "qlora_dist.data.splits:write_splits", version=3, spreads=True),
        Stage("shards", told.ShardsConfig, "qlora_dist.data.shards:write_shards", version=2, spreads=True),
        Stage("tokenizer", told.TokenizerConfig, "qlora_dist.model.tokenizer:write_tokenizer"),
        Stage("rows", told.RowsConfig, "qlora_dist.data.rows:write_rows", spreads=True),
        Stage("tiny", told.TinyStageConfig, "qlora_dist.model.tiny:make_tiny", loads_model=True),
        Stage("base", told.BaseConfig, "qlora_dist.model.base:prepare_base", names=("tiny",)),
        Stage(
            "adapter",
            told.AdapterConfig,
            "qlora_dist.train:train_adapter",
            joint="qlora_dist.train:train_adapters",
            loads_model=True,
            resumes=True,
        ),
        Stage(
            "validated",
            told.ScoresConfig,
            "qlora_dist.evaluate.scores:score_model",
            joint="qlora_dist.evaluate.scores:score_models",
            loads_model=True,
            resumes=True,
        ),
        Stage("winner", told.WinnerConfig, "qlora_dist.pipeline.winner:choose_trial"),
        Stage(
            "halved",
            told.HalvedConfig,
            "qlora_dist.pipeline.halved:halve_trials",
            loads_model=True,
            resumes=True,
        ),
        Stage(
            "worker",
            told.WorkerConfig,
            "qlora_dist.pipeline.rounds:train_worker",
            loads_model=True,
            resumes=True,
            meets=True,
        ),
        Stage("merged_part", told.MergedPartConfig, "qlora_dist.adapters.parts:merge_part"),
        Stage("merged", told.MergedConfig, "qlora_dist.adapters.merge:merge_adapters"),
        Stage("export", told.ExportedConfig, "qlora_dist.export.stage:export_model", loads_model=True),
        Stage(
            "chosen",
            told.ChosenConfig,
            "qlora_dist.pipeline.referee:choose_merge",
            version=2,
            loads_model=True,
            resumes=True,
        ),
        Stage(
            "scores",
            told.ScoresConfig,
            "qlora_dist.evaluate.scores:score_model",
            version=2,
            joint="qlora_dist.evaluate.scores:score_models",
            loads_model=True,
            resumes=True,
        ),
    )
}
