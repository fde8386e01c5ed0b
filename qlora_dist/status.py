"""`python -m qlora_dist.status runs/legal`: where each node of a run is, why, for how long, how far, and its log."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence

from qlora_dist.errors import QloraDistError

WATCH_S = 5.0
CLOSING_LOOKS = 12
"""So many looks at a run whose nodes have all ended are given to whoever closes it; a launcher that died never will."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints how a run stands; returns 1 if a node failed."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.status", description="Show how a run stands.")
    parser.add_argument("folder", help="the run's folder, as runs/legal")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_S:g} seconds, until all has ended")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    try:
        looks = 0
        while True:
            has_ended, has_failed, is_closed = _show(args.folder, args.json)
            looks += has_ended
            if not args.watch or (has_ended and (is_closed or looks > CLOSING_LOOKS)):
                return int(has_failed)
            time.sleep(WATCH_S)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _show(folder: str, as_json: bool) -> tuple[bool, bool, bool]:
    """Prints how a run stands; says whether all its nodes have ended, whether one failed, and whether it is closed."""
    from qlora_dist.launch.standing import Standing, run_folder, standings

    plan = run_folder(folder)
    found, note = standings(plan)
    counts = Counter(one.state for one in found)
    closed = (plan.folder / "summary.json").exists()
    if as_json:
        nodes = [dataclasses.asdict(one) for one in found]
        print(json.dumps({"run": plan.experiment, "counts": counts, "nodes": nodes, "note": note}, indent=1))
    else:
        lines = [Standing("node", "state", "reason", "time", "step", "log"), *found]
        wide = max(len(one.node) for one in lines)
        for one in lines:
            cells = f"{one.node:<{wide}}  {one.state:<9}  {one.time:>10}  {one.step:>9}  {one.reason}"
            print(cells.rstrip() if one.state in ("done", "waiting", "skipped") else f"{cells}  {one.log}".rstrip())
        said = ", ".join(f"{number} {state}" for state, number in counts.most_common())
        print(f"{plan.experiment}: {said}" + (f"; {plan.folder / 'report.html'}" if closed else ""))
        if note:
            print(f"note: {note}", file=sys.stderr)
    return not counts["running"] and not counts["waiting"], bool(counts["failed"]), closed


if __name__ == "__main__":
    sys.exit(main())
