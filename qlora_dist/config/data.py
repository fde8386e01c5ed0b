"""Where a domain's records come from, how they are cleaned and split, and how they become packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import setting
from qlora_dist.errors import bad_value


class ShardMode(Enum):
    """How a domain's training records are dealt to its shards."""

    iid = "iid"
    by_source = "by_source"
    stratified = "stratified"


class Deduplicate(Enum):
    """Which copies of a record are dropped."""

    none = "none"
    exact = "exact"
    near = "near"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One place records come from: a file, a folder, a glob, a Hugging Face dataset id, or `installed:<corpus>`."""

    path: str = "???"
    weight: float = setting(1.0, above=0)


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """How a domain's records are divided into train, validation and test."""

    validation_share: float = setting(0.08, at_least=0, below=1)
    test_share: float = setting(0.08, at_least=0, below=1)
    deduplicate: Deduplicate = setting(Deduplicate.near)
    near_threshold: float = setting(0.8, above=0, at_most=1)

    def check(self, key: str) -> None:
        """Refuses held-out shares that leave nothing to train on."""
        if self.validation_share + self.test_share >= 1:
            raise bad_value(f"{key}.test_share", self.test_share, f"less than 1 - {key}.validation_share")


@dataclass(kw_only=True, slots=True)
class DomainConfig:
    """One subject: its corpus, how it is cleaned, split and sharded."""

    sources: list[SourceConfig] = setting(list)
    max_reject_share: float = setting(0.05, at_least=0, at_most=1)
    split: SplitConfig = setting(SplitConfig)
    num_shards: int = setting(2, at_least=1, at_most=100_000)
    shard_mode: ShardMode = setting(ShardMode.iid)
    shard_weight: float = setting(1.0, above=0)

    def check(self, key: str) -> None:
        """Refuses a domain without sources."""
        if not self.sources:
            raise bad_value(
                f"{key}.sources", self.sources, "at least one source", f"Set {key}.sources=[{{path: DIR}}]."
            )
