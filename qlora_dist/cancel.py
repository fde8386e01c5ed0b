"""`python -m qlora_dist.cancel runs/legal`: ends what is left of a run; what is finished stays."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from qlora_dist.errors import LaunchError, QloraDistError

SUBMIT_S = 60.0
"""How long a launcher may take to end, which first submits what it has begun to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Ends the jobs and the launching process of a run."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.cancel", description="End what is left of a run.")
    parser.add_argument("folder", help="the run's folder, as runs/legal")
    args = parser.parse_args(argv)
    try:
        print(_cancel(args.folder))
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _cancel(folder: str) -> str:
    from qlora_dist.artifacts.owner import describe, living_owner
    from qlora_dist.launch.slurm.launcher import cancel_tasks
    from qlora_dist.launch.standing import run_folder

    plan, said = run_folder(folder), []
    owner = living_owner(plan.folder)
    is_here = owner is not None and owner.get("host") == socket.gethostname()
    if owner and is_here:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(owner["pid"]), signal.SIGTERM)
        said.append(f"{describe(owner)} was asked to end.")
        _wait_while(lambda: plan.config["launcher"]["name"] == "slurm" and bool(living_owner(plan.folder)))
    ended = cancel_tasks(plan.folder, float(plan.config["launcher"]["slurm"]["answer_s"]))
    if ended:
        said.insert(0, f"{ended} jobs were cancelled in Slurm's queue.")
    if owner and not is_here:
        raise LaunchError(f"{folder} is run by {describe(owner)}: end it there, with kill {owner.get('pid')}.")
    return " ".join(said) or "Nothing of it runs."


def _wait_while(submits: Callable[[], bool]) -> None:
    """Waits for a launcher that may be submitting: what it submits after the queue was emptied would run."""
    end = time.monotonic() + SUBMIT_S
    while submits() and time.monotonic() < end:
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
