"""Hydra's `-m`: every point is checked before the first runs, and each has a results folder of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from qlora_dist.errors import QloraDistError
from qlora_dist.launch.compose import compose_run, run_config


def check_points(arguments: Sequence[str]) -> None:
    """Composes every point of a multirun, so that a mistake in the last one shows before the first runs.

    Raises:
        ConfigError: at the first point that can't be.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    flags = get_args_parser().parse_args(list(arguments))
    if not flags.multirun:
        return
    parsed = OverridesParser.create().parse_overrides(flags.overrides)
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        for point in batch:
            compose_run(point, flags.config_dir)


def run_point(composed: DictConfig) -> int:
    """Runs what Hydra composed and returns the exit code; a point of `-m` gets `name-<what it overrides>`."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from rich.console import Console

    from qlora_dist.launch.__main__ import command_line
    from qlora_dist.launch.drive import run

    told = HydraConfig.get()
    console = Console()
    try:
        config = run_config(composed)
        if told.mode is RunMode.MULTIRUN:
            config.name += "-" + re.sub(r"[^A-Za-z0-9_.=-]+", "_", told.job.override_dirname)
            console.rule(config.name)
        return run(config, command_line(told.overrides.task), console)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
