"""Several nodes in one process: one after another, or made at once by the joint function of their stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby

from qlora_dist.errors import Preempted, QloraDistError, disk_error
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.run import begin, finish, leave_word, ownership, reporting, run_and_report, sees_inputs
from qlora_dist.pipeline.stages import STAGES
from qlora_dist.pipeline.tracked import say_made, tracked
from qlora_dist.runtime import Facts, log, rank

INTERRUPTED = 130
STOPS = (Preempted.exit_code, INTERRUPTED)
"""Exit codes after which no further node is begun: somebody asked this process to stop."""


def run_nodes(plan: Plan, nodes: Sequence[Node]) -> int:
    """Runs nodes, each an artifact of its own; returns the first exit code that isn't 0, or that of a stop.

    A node that fails takes no other along but those that read what it would have made: they are skipped.
    """
    first = 0
    for batch in _batches(nodes):
        ready = [node for node in batch if _is_ready(plan, node)] if len(nodes) > 1 else batch
        code = 0 if len(ready) == len(batch) else 1
        if ready:
            jointly = bool(ready[0].group and STAGES[ready[0].stage].joint)
            code = (_run_jointly(plan, ready) if jointly else run_and_report(plan, ready[0])) or code
        if code in STOPS:
            return code
        first = first or code
    return first


def _batches(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Yields nodes that are made at once, or one by one."""
    for (stage, group), found in groupby(nodes, lambda node: (node.stage, node.group)):
        if group and STAGES[stage].joint:
            yield list(found)
        else:
            yield from ([node] for node in found)


def _is_ready(plan: Plan, node: Node) -> bool:
    if sees_inputs(plan, node):
        return True
    print(f"skipped: {node.name}: not all that it reads is finished", file=sys.stderr)
    return False


def _run_jointly(plan: Plan, nodes: Sequence[Node]) -> int:
    """Makes nodes of one stage at once, and commits each that came out."""
    code = 0

    def work() -> int:
        nonlocal code
        with ExitStack() as stack:
            # In one order everywhere, so that two launches never wait for each other.
            mine = [n for n in sorted(nodes, key=lambda n: n.id) if stack.enter_context(ownership(plan, n))]
            mine = [node for node in mine if not plan.store.is_finished(node.id)]
            log.info("%d of %d nodes to make at once", len(mine), len(nodes))
            if mine:
                code = _make(plan, mine, stack)
        return code

    return reporting(plan, nodes, work)


def _make(plan: Plan, nodes: Sequence[Node], stack: ExitStack) -> int:
    started = time.monotonic()
    outs = {node.label: begin(plan, node) for node in nodes}
    for node in nodes:
        stack.enter_context(tracked(plan, node, lane=node.label))
    try:
        made = STAGES[nodes[0].stage].load_joint()(
            {node.label: node.told() for node in nodes},
            {node.label: plan.inputs(node) for node in nodes},
            outs,
        )
        share_s = (time.monotonic() - started) / len(nodes)  # so that a run's seconds add up
        return max(_end(plan, node, made[node.label], share_s) for node in nodes)
    except OSError as error:
        raise disk_error(error, plan.staged_root) or error from error


def _end(plan: Plan, node: Node, made: Facts | QloraDistError, seconds: float) -> int:
    """Commits one node's artifact, or leaves word of why there is none; returns its exit code."""
    if isinstance(made, QloraDistError):
        print(f"error: {node.name}: {made}", file=sys.stderr)
        leave_word(plan, node, str(made), made.exit_code)
        return made.exit_code
    if rank() == 0:
        finish(plan, node, made, seconds)
        say_made(plan, node, made, lane=node.label)
    return 0
