"""Runs nodes of a frozen plan: `python -m qlora_dist.pipeline PLAN NODE...`. Launchers start this, people may."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time

from qlora_dist.errors import QloraDistError
from qlora_dist.runtime import quiet_libraries

LAUNCHER_VARIABLE = "QLORA_DIST_LAUNCHER"
"""Names the launcher's process id: a node whose local launcher is gone ends itself."""


def main(argv: list[str] | None = None) -> int:
    """Runs the named nodes and returns the first non-zero exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.pipeline", description="Run nodes of a frozen plan.")
    parser.add_argument("plan", help="the plan.json of a run: a path, or a URL")
    parser.add_argument("nodes", nargs="+", metavar="node", help="<stage>/<label>, as plan_only=true lists them")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    quiet_libraries()
    _watch_launcher()
    from qlora_dist.pipeline.group import run_nodes
    from qlora_dist.pipeline.plan import read_plan
    from qlora_dist.pipeline.publish import published

    try:
        plan = read_plan(args.plan)
        nodes = [plan.node(name) for name in args.nodes]
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with published(plan, nodes):
        return run_nodes(plan, nodes)


def _watch_launcher() -> None:
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher:
        threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()


def _end_with(pid: int) -> None:
    import psutil

    while psutil.pid_exists(pid):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
