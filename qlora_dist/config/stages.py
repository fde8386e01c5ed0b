"""What each stage is told: one dataclass a stage, cut from the run's config by `pipeline.plan`.

The identity fields of these, with the keys of a node's inputs, are the node's key.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.config.data import DomainConfig, RenderConfig, ShardMode, SplitConfig
from qlora_dist.config.evaluate import EvaluateConfig, TrackingConfig
from qlora_dist.config.export import ExportConfig
from qlora_dist.config.fields import execution, setting
from qlora_dist.config.merge import MergeConfig, MergeWeights, OuterConfig
from qlora_dist.config.model import ModelConfig, TinyConfig
from qlora_dist.config.sweep import TrialConfig
from qlora_dist.config.train import LoraConfig, StrategyConfig, TrainConfig


@dataclass(kw_only=True, slots=True)
class RecordsConfig:
    """Stage `records`: read and check one part of a domain's source files.

    `files` are this part's, resolved when the plan was made; they are known by their bytes (`leaf digests`).
    """

    domain: str = "???"
    source: DomainConfig = setting(DomainConfig)
    files: list[str] = execution(list)
    part: int = 0


@dataclass(kw_only=True, slots=True)
class SplitsConfig:
    """Stage `splits`: drop copies over all parts of a domain, and deal records to train, validation and test."""

    domain: str = "???"
    split: SplitConfig = setting(SplitConfig)
    max_reject_share: float = execution(0.05)


@dataclass(kw_only=True, slots=True)
class ShardsConfig:
    """Stage `shards`: deal a domain's training records to `num_shards` shards of equally many tokens."""

    domain: str = "???"
    num_shards: int = 1
    shard_mode: ShardMode = setting(ShardMode.iid)
    render: RenderConfig = setting(RenderConfig)


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """Stage `tokenizer`: the base's tokenizer and model config, copied, or trained for the embedded base."""

    path: str = ""
    revision: str = ""
    tiny: TinyConfig | None = None


@dataclass(kw_only=True, slots=True)
class RowsConfig:
    """Stage `rows`: tokenize records and pack them into rows of `row_tokens`."""

    split: str = "train"
    shard: int = -1
    row_tokens: int = 256
    render: RenderConfig = setting(RenderConfig)


@dataclass(kw_only=True, slots=True)
class TinyStageConfig:
    """Stage `tiny`: pre-train the embedded base."""

    tiny: TinyConfig = setting(TinyConfig)


@dataclass(kw_only=True, slots=True)
class BaseConfig:
    """Stage `base`: check the base model and describe it."""

    model: ModelConfig = setting(ModelConfig)


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Stage `adapter`: train one adapter on one shard's rows."""

    model: ModelConfig = setting(ModelConfig)
    lora: LoraConfig = setting(LoraConfig)
    train: TrainConfig = setting(TrainConfig)
    strategy: StrategyConfig = execution(StrategyConfig)
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class RoundsConfig:
    """Who trains together apart, how often they are averaged, and by which step; `shard_weights` are relative."""

    workers: list[str] = setting(list)
    every_steps: int = 25
    outer: OuterConfig = setting(OuterConfig)
    weights: MergeWeights = MergeWeights.tokens
    shard_weights: dict[str, float] = setting(dict)


@dataclass(kw_only=True, slots=True)
class WorkerConfig(AdapterConfig):
    """Stage `worker`: train one adapter on one shard's rows, averaged with the others in rounds.

    `meeting` is the folder where they meet, on storage that all of them reach.
    """

    label: str = ""
    rounds: RoundsConfig = setting(RoundsConfig)
    meeting: str = execution("")
    wait_s: float = execution(600.0)
    patience_s: float = execution(30.0)


@dataclass(kw_only=True, slots=True)
class MergedConfig:
    """Stage `merged`: make one adapter out of several; `shard_weights` are relative, by the input's name.

    `model` is told to methods that run the base (regmean, learned), whose inputs are `base` and `rows-<label>` too.
    With `rounds` the inputs are workers, and the last round's average is the adapter.
    """

    merge: MergeConfig = setting(MergeConfig)
    shard_weights: dict[str, float] = setting(dict)
    model: ModelConfig | None = None
    rounds: RoundsConfig | None = None


@dataclass(kw_only=True, slots=True)
class MergedPartConfig:
    """Stage `merged_part`: merge one range of the modules, of `num_parts` ranges."""

    merge: MergeConfig = setting(MergeConfig)
    shard_weights: dict[str, float] = setting(dict)
    part: int = 0
    num_parts: int = 1


@dataclass(kw_only=True, slots=True)
class ScoresConfig:
    """Stage `scores`: measure one model on every held-out set.

    By domain, `render` says how questions are put, and `terms` lists the domain's own words.
    """

    model: ModelConfig = setting(ModelConfig)
    evaluate: EvaluateConfig = setting(EvaluateConfig)
    render: dict[str, RenderConfig] = setting(dict)
    terms: dict[str, list[str]] = setting(dict)
    name: str = "base"
    full: bool = False


@dataclass(kw_only=True, slots=True)
class ChosenConfig:
    """Stage `chosen`: make every candidate merge, score them on development data, and keep the one to ship."""

    merge: MergeConfig = setting(MergeConfig)
    shard_weights: dict[str, float] = setting(dict)
    model: ModelConfig = setting(ModelConfig)
    evaluate: EvaluateConfig = execution(EvaluateConfig)
    max_rows: int = 0


@dataclass(kw_only=True, slots=True)
class WinnerConfig:
    """Stage `winner`: choose among a shard's trials, which were all trained to the end, by development data."""

    domain: str = "???"
    trials: list[TrialConfig] = setting(list)
    max_forgetting: float = 0.1


@dataclass(kw_only=True, slots=True)
class HalvedConfig:
    """Stage `halved`: train a shard's trials from rung to rung, a part of them at each, and choose among the last."""

    domain: str = "???"
    model: ModelConfig = setting(ModelConfig)
    trials: list[TrialConfig] = setting(list)
    strategy: StrategyConfig = execution(StrategyConfig)
    eta: int = 3
    first_rung_tokens: int = 0
    max_forgetting: float = 0.1
    max_rows: int = 0
    lanes: int = execution(0)
    batch_tokens: int = execution(4096)
    experiment: str = execution("")
    root: str = execution("")
    staging: str = execution("")
    tracking: TrackingConfig = execution(TrackingConfig)


@dataclass(kw_only=True, slots=True)
class RungConfig:
    """What a trial is at a rung: the recipe of its whole training, of which so many steps are taken."""

    domain: str = "???"
    model: ModelConfig = setting(ModelConfig)
    trial: TrialConfig = setting(TrialConfig)
    steps: int = 0
    max_rows: int = 0


@dataclass(kw_only=True, slots=True)
class ExportedConfig:
    """Stage `export`: merge the shipped adapter into its base, in one format."""

    export: ExportConfig = setting(ExportConfig)
