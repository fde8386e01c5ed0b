"""Closes a run whose launcher may be gone: `python -m qlora_dist.launch.closing runs/legal/plan.json`, a job too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qlora_dist.errors import Preempted, QloraDistError
from qlora_dist.launch.base import Job
from qlora_dist.launch.slurm.shape import CLOSE
from qlora_dist.launch.standing import Standing, standings
from qlora_dist.pipeline.close import Ending, close_run, ending_of
from qlora_dist.pipeline.plan import Node, Plan, read_plan
from qlora_dist.runtime import quiet_libraries

ENDED = {"done", "failed", "skipped", "cancelled"}


def closing_job(plan: Plan, jobs: Sequence[Job]) -> Job:
    """Returns the job that closes the run once all others have ended, well or not."""
    word = plan.folder / "logs" / f"{CLOSE}.failed.json"
    return Job(
        name=CLOSE,
        argv=[sys.executable, "-m", "qlora_dist.launch.closing", plan.address],
        log=plan.folder / "logs" / f"{CLOSE}.log",
        after=[job.name for job in jobs],
        any_node=True,
        words=[word],
    )


def close(plan: Plan) -> int:
    """Writes summary, report and what is shipped; returns 75, again later, while a node may still be made."""
    found, _ = standings(plan)
    left = [one.node for one in found if one.state == "running"]
    if left:
        print(f"not closed: {len(left)} nodes have not ended ({', '.join(left[:5])})")
        return Preempted.exit_code
    endings = {node.name: _ending(plan, node, one) for node, one in zip(plan.nodes, found, strict=True)}
    summary = close_run(plan, endings)
    print(f"closed: {summary['state']}; {plan.folder / 'report.html'}")
    return 0


def _ending(plan: Plan, node: Node, one: Standing) -> Ending:
    if one.state == "failed" and one.reason:  # Slurm's own word, where the job could leave none
        return Ending(one.state, 0.0, one.reason)
    return ending_of(plan, node, one.state if one.state in ENDED else "cancelled", 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Closes the run of a frozen plan and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.launch.closing", description=__doc__)
    parser.add_argument("plan", help="the plan's file or URL, as runs/legal/plan.json")
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        return close(read_plan(args.plan))
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
