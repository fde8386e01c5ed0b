"""The config of a whole run: one dataclass a group, checked as a whole before any work."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_dist.config.data import DomainConfig, Use
from qlora_dist.config.evaluate import EvaluateConfig, TrackingConfig
from qlora_dist.config.export import ExportConfig
from qlora_dist.config.fields import execution, setting
from qlora_dist.config.launch import LauncherConfig
from qlora_dist.config.merge import MergeConfig
from qlora_dist.config.model import ModelConfig
from qlora_dist.config.sweep import SweepConfig, SweepName, check_sweep
from qlora_dist.config.train import LoraConfig, Method, StrategyConfig, TrainConfig, check_step, check_supported
from qlora_dist.errors import bad_value


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything one command runs: domains, base, recipe, merge, scores, and where it happens."""

    name: str = execution("run")
    root: str = execution("runs")
    staging: str = execution("")
    seed: int = setting(17, at_least=0, at_most=2**31 - 1)
    plan_only: bool = execution(False)
    domain: dict[str, DomainConfig] = setting(dict)
    general: DomainConfig = setting(DomainConfig)
    model: ModelConfig = setting(ModelConfig)
    lora: LoraConfig = setting(LoraConfig)
    train: TrainConfig = setting(TrainConfig)
    strategy: StrategyConfig = setting(StrategyConfig)
    sweep: SweepConfig = setting(SweepConfig)
    merge: MergeConfig = setting(MergeConfig)
    evaluate: EvaluateConfig = setting(EvaluateConfig)
    export: ExportConfig = setting(ExportConfig)
    tracking: TrackingConfig = setting(TrackingConfig)
    launcher: LauncherConfig = setting(LauncherConfig)

    def check(self, key: str) -> None:
        """Refuses names that can't be folders, and steps that do not divide."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.=-]*", self.name) or self.name == "artifacts":
            wanted = "letters, digits, '_', '-' and '.', and not 'artifacts'"
            raise bad_value("name", self.name, wanted, "It names the folder of the results.")
        if not self.domain:
            raise bad_value("domain", "[]", "at least one domain", "Set domain=[legal].")
        for name in self.domain:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in ("general", "rows", "merged_part"):
                wanted = "a name of lower-case letters, digits and '_' other than 'general', 'rows' and 'merged_part'"
                raise bad_value(f"domain.{name}", name, wanted)
        check_step(self.train, self.strategy.world_size)
        check_supported(self.train, self.strategy)
        check_sweep(self.sweep, self.lora, self.train, self.seed, self.strategy)
        if self.sweep.name is not SweepName.none:
            self._check_development()
        if self.merge.every_steps and self.sweep.name is not SweepName.none:
            raise bad_value("merge.every_steps", self.merge.every_steps, "0 with a sweep: a trial trains alone")
        if self.merge.every_steps and self.train.method is Method.full:
            raise bad_value("train.method", "full", "lora with merge.every_steps: adapters are averaged")

    def _check_development(self) -> None:
        """Refuses a sweep over what has no development data: its trials are judged by nothing else."""
        domains = {"general": self.general} | {f"domain.{name}": domain for name, domain in self.domain.items()}
        for key, domain in domains.items():
            if not domain.split.validation_share and all(source.use is not Use.validation for source in domain.sources):
                name = f"{key}.split.validation_share"
                wanted = "more than 0 with a sweep, which judges its trials by development data"
                repair = f"Set {name}=0.08, use=validation for one of {key}.sources, or sweep=none."
                raise bad_value(name, domain.split.validation_share, wanted, repair)
