"""Several nodes in one process: one after another, or made at once by the joint function of their stage."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from qlora_dist.errors import PeerLost, Preempted, QloraDistError, TrainError, disk_error
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.run import begin, finish, leave_word, ownership, reporting, run_and_report, sees_inputs
from qlora_dist.pipeline.stages import STAGES
from qlora_dist.pipeline.tracked import say_made, tracked
from qlora_dist.pipeline.winner import LOST
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
        ready = [node for node in ready if _is_trial(plan, node) or not _reads_lost(plan, node)]
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


def _is_trial(plan: Plan, node: Node) -> bool:
    """Says that a node belongs to a trial, or chooses among them: a trial that was lost is one of its answers."""
    readers = (other for other in plan.nodes if other.stage == "winner")
    return node.stage == "winner" or any(node.id in other.inputs.values() for other in readers)


def _why_lost(plan: Plan, node: Node) -> dict[str, str]:
    """Returns which of a node's inputs are of a trial that was lost, and why."""
    read = [i for i in node.inputs.values() if plan.node(i).stage == "adapter" and plan.store.has(i)]
    facts = {i: plan.store.manifest(i).facts for i in read}
    return {i: str(told[LOST]) for i, told in facts.items() if LOST in told}


def _reads_lost(plan: Plan, node: Node) -> bool:
    """Refuses a node that reads an adapter of which a sweep found that its training is lost; leaves word of it."""
    for artifact_id, why in _why_lost(plan, node).items():
        again = f"Change the recipe, or delete {plan.store.folder(artifact_id)} to train it again"
        message = f"{plan.node(artifact_id).name} was trained in a sweep, and lost. {why} {again}."
        print(f"error: {node.name}: {message}", file=sys.stderr)
        leave_word(plan, node, message, TrainError.exit_code)
        return True
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
    lost: dict[str, Facts] = {}
    for node in nodes:
        if why := _why_lost(plan, node):
            lost[node.label] = {LOST: next(iter(why.values()))}
    told = [node for node in nodes if node.label not in lost]
    try:
        made: dict[str, Facts | QloraDistError] = {**lost}
        if told:
            made |= STAGES[nodes[0].stage].load_joint()(
                {node.label: node.told() for node in told},
                {node.label: plan.inputs(node) for node in told},
                {node.label: outs[node.label] for node in told},
            )
        share_s = (time.monotonic() - started) / len(nodes)  # so that a run's seconds add up
        return max(_end(plan, node, made[node.label], share_s) for node in nodes)
    except OSError as error:
        raise disk_error(error, plan.staged_root) or error from error


def _end(plan: Plan, node: Node, made: Facts | QloraDistError, seconds: float) -> int:
    """Commits one node's artifact, or leaves word of why there is none; returns its exit code."""
    if node.stage == "adapter" and _is_trial(plan, node):
        made = _end_of_trial(node, made, plan.store.partial(node.id))
    if isinstance(made, QloraDistError):
        print(f"error: {node.name}: {made}", file=sys.stderr)
        leave_word(plan, node, str(made), made.exit_code)
        return made.exit_code
    if rank() == 0:
        finish(plan, node, made, seconds)
        say_made(plan, node, made, lane=node.label)
    return 0


def _end_of_trial(node: Node, made: Facts | QloraDistError, out: Path) -> Facts | QloraDistError:
    """Returns what a trial came to: that its loss was lost is a finding, which the choice among the others needs.

    Nothing else counts as lost: no other error, and no job that was stopped or killed. Rank 0 alone writes metrics, so
    the others leave the answer to it.
    """
    if isinstance(made, PeerLost) or not isinstance(made, TrainError):
        return made
    if rank() != 0:
        return {}
    from qlora_dist.train.course import CHECKPOINTS, METRICS_FILE

    last, kept = _metrics(out / METRICS_FILE)
    if _is_finite(last):
        return made
    log.warning("%s was lost: %s", node.name, made)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    (out / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
    return {LOST: str(made), "tokens": last["step"] * node.config["train"]["tokens_per_step"]}


def _is_finite(line: dict[str, Any]) -> bool:
    return math.isfinite(line.get("loss", 0.0)) and math.isfinite(line.get("grad_norm", 0.0))


def _metrics(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the last line of a training's metrics, and all lines whose loss is a number."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [line for line in lines if _is_finite(line)]
    return (lines[-1] if lines else {}), kept
