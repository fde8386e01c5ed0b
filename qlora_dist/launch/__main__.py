"""`python -m qlora_dist.launch +experiment=legal`: compose the config, make the plan, run it."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.errors import QloraDistError, disk_error
from qlora_dist.runtime import quiet_libraries

if TYPE_CHECKING:
    from omegaconf import DictConfig

PROGRAM = "python -m qlora_dist.launch"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 done, 1 a node failed, 2 a bad config, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(arguments):
        from qlora_dist.launch.conf import help_text

        print(help_text(), end="")
        return 0
    quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the nodes as Ctrl-C does
    try:
        if any(argument.startswith("-") for argument in arguments):
            return _with_hydra_flags(arguments)
        return _run_overrides(arguments)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        known = disk_error(error, Path.cwd())
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code
    except KeyboardInterrupt:
        return 130


def _run_overrides(overrides: list[str]) -> int:
    from qlora_dist.launch.compose import compose_run

    config = compose_run(overrides)
    from rich.console import Console

    from qlora_dist.launch.drive import run

    return run(config, command_line(overrides), Console())


def command_line(overrides: Sequence[str]) -> str:
    """Returns the command that runs the same again."""
    return shlex.join([*PROGRAM.split(), *overrides])


def _with_hydra_flags(arguments: list[str]) -> int:
    """Hands Hydra's own flags (`--help`, `--cfg`, `--info`, `-m` …) to Hydra; its jobs run as ours do."""
    import hydra

    from qlora_dist.launch.conf import conf_folder
    from qlora_dist.launch.multirun import check_points, run_point
    from qlora_dist.launch.schema import register_schema

    register_schema()
    ordered, swept = check_points(arguments)
    sys.argv = [PROGRAM, *ordered]
    codes: list[int] = []

    def task(composed: DictConfig) -> None:
        codes.append(run_point(composed, swept))

    start: Callable[[], None] = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(
        task
    )
    start()
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
