"""Hydra's `-m`: every point is checked before the first runs, and each has a results folder of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence, Set

from omegaconf import DictConfig

from qlora_dist.errors import QloraDistError, bad_value
from qlora_dist.launch.compose import compose_run, parse_override, run_config


def check_points(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """Composes every point of a multirun, so that a mistake in the last one shows before the first runs.

    Returns the arguments with flags first (Hydra takes no override after a flag that follows one), and the keys that
    are swept.

    Raises:
        ConfigError: for broken grammar, a sweep that can't be listed, or at the first point that can't be.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.types import Glob

    flags = get_args_parser().parse_intermixed_args(list(arguments))
    ordered: list[str] = [argument for argument in arguments if argument not in flags.overrides] + flags.overrides
    if not flags.multirun:
        return ordered, set()
    parsed = [parse_override(line) for line in flags.overrides]
    for override in parsed:
        is_listed = override.is_discrete_sweep() and not isinstance(override.value(), Glob)
        if override.is_sweep_override() and not is_listed:
            key, _, value = str(override.input_line).partition("=")
            raise bad_value(key, value, "values that -m can list", f"Write each one: {key}=<one>,<another>.")
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        for point in batch:
            compose_run(point, flags.config_dir)
    return ordered, {override.key_or_group for override in parsed if override.is_sweep_override()}


def run_point(composed: DictConfig, swept: Set[str]) -> int:
    """Runs what Hydra composed and returns the exit code; a point of `-m` gets `name-<its swept values>`."""
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
            own = [line for line in told.overrides.task if line.lstrip("+~").partition("=")[0] in swept]
            config.name += "-" + re.sub(r"[^A-Za-z0-9_.=-]+", "_", "-".join(own))
            console.rule(config.name)
        return run(config, command_line(told.overrides.task), console)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
