"""The one place where the config dataclasses meet Hydra."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from qlora_dist.config.run import RunConfig


def register_schema() -> None:
    """Registers `RunConfig` as `run_schema`, the first entry of conf/config.yaml's defaults list."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
