"""What trackers are told of a node: what it logs while it works, and, once it is made, of what it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from qlora_dist.artifacts.store import MANIFEST
from qlora_dist.config.evaluate import TrackingConfig, TrackingName
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.winner import ADAPTER, adapter_facts
from qlora_dist.runtime import Facts, Made, log_made, log_metrics, sinks

TRIAL_METRICS = ("validation_bits_per_byte", "forgetting", "over_best")


@contextmanager
def tracked(plan: Plan, node: Node, lane: str = "") -> Iterator[None]:
    """Sends what the node logs to the run's tracker, inside the `with` block."""
    told = plan.config["tracking"]
    tracking = TrackingConfig(**{**told, "name": TrackingName[told["name"]]})
    with ExitStack() as stack:
        if tracking.name is not TrackingName.none:
            _open(plan, node, tracking, lane, stack)
        yield


def _open(plan: Plan, node: Node, tracking: TrackingConfig, lane: str, stack: ExitStack) -> None:
    from qlora_dist.tracking import open_tracker

    tracker = open_tracker(
        tracking,
        name=f"{node.stage}-{node.label}",
        run_id=f"{node.stage}-{node.label}-{node.key}",
        group=plan.experiment,
        job_type=node.stage,
        recipe=node.recipe,
        folder=plan.folder,
    )
    if sink := stack.enter_context(tracker):
        stack.enter_context(sinks(sink, lane=lane))


def say_made(plan: Plan, node: Node, facts: Facts, lane: str = "") -> None:
    """Tells the node's trackers, which are still open, what was made, what was found of it, and of what it was made."""
    parents = [_made(plan, plan.node(artifact_id), {}) for artifact_id in dict.fromkeys(node.inputs.values())]
    log_made(_made(plan, node, facts), [parent for parent in parents if parent.manifest.exists()], lane)


def say_trials(plan: Plan, node: Node, facts: Facts) -> None:
    """Tells the run in which each trial was trained what it came to on development data, and whether it is chosen.

    So a trial is one run with its config and its result as columns. For a node that chose among no trials' adapters
    there is nothing to tell; a halving tells its trials itself, while it trains them.
    """
    for row in facts.get("trials", ()):
        name = ADAPTER + row["trial"]
        if name in node.inputs:
            trained = adapter_facts(plan.inputs(node)[name])
            with tracked(plan, plan.node(node.inputs[name]), lane=name):
                log_metrics(int(trained.get("num_steps", 0)), trial_values(row, facts["winner"]), lane=name)


def trial_values(row: Mapping[str, Any], winner: str) -> dict[str, float]:
    """Returns the numbers of a verdict's row that a tracker shows: what wasn't found is left out."""
    known = {name: row[name] for name in TRIAL_METRICS if row.get(name) is not None}
    return known | {"is_chosen": float(row["trial"] == winner)}


def _made(plan: Plan, node: Node, facts: Facts) -> Made:
    return Made(
        stage=node.stage,
        label=node.label,
        key=node.key,
        manifest=plan.store.folder(node.id) / MANIFEST,
        facts=facts,
    )
