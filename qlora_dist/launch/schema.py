"""The one place where the config dataclasses meet Hydra."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_store import ConfigStore

from qlora_dist.config.run import RunConfig


def register_schema() -> None:
    """Registers `RunConfig` as `run_schema`, the first entry of conf/config.yaml's defaults list."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def conf_folder() -> Path:
    """Returns the folder of config files: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
