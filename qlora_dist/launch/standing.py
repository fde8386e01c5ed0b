"""How a run stands: the state of each node, from what lies in its folders and, on Slurm, from the queue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.artifacts.owner import living_owner
from qlora_dist.errors import ArtifactError, LaunchError, Preempted
from qlora_dist.launch.slurm.client import Task
from qlora_dist.launch.slurm.launcher import NEVER, known_tasks, why
from qlora_dist.launch.slurm.submission import last_submission
from qlora_dist.pipeline.plan import Node, Plan


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one node is: its state, why, for how long, how far, and its log."""

    node: str
    state: str
    reason: str = ""
    time: str = ""
    step: str = ""
    log: str = ""


def standings(plan: Plan) -> tuple[list[Standing], str]:
    """Returns where each node of a plan is, and what could not be found out."""
    note, tasks = "", {}
    finished = plan.store.finished(node.id for node in plan.nodes)
    try:
        tasks = tasks_by_job(plan, finished)
    except LaunchError as error:
        note = str(error)
    found: dict[str, Standing] = {}
    for node in plan.nodes:
        found[node.id] = _standing(plan, node, tasks.get(node.job), found, node.id in finished)
    return list(found.values()), note


def tasks_by_job(plan: Plan, finished: Set[str]) -> dict[str, Task]:
    """Returns what Slurm knows of each unfinished job of a run's last submission, if this very plan's nodes are in it.

    Raises:
        LaunchError: if Slurm doesn't answer.
    """
    submission = last_submission(plan.folder)
    if submission is None:
        return {}
    places, known = submission.places(), {node.id for node in plan.nodes}
    answer_s = float(plan.config["launcher"]["slurm"]["answer_s"])
    left = {job for job, ids in submission.nodes.items() if known.issuperset(ids) and not finished >= set(ids)}
    tasks = known_tasks((place for job, place in places.items() if job in left), answer_s)
    return {job: tasks[place] for job, place in places.items() if job in left and place in tasks}


def _standing(plan: Plan, node: Node, task: Task | None, found: Mapping[str, Standing], is_finished: bool) -> Standing:
    log = str(plan.log_path(node))
    if is_finished:
        seconds = plan.store.manifest(node.id).seconds
        return Standing(node.name, "done", time=f"{seconds:.0f} s", log=log)
    took = task.time if task else ""
    state, reason = _state(plan, node, task, found)
    progress = _read(plan.progress_path(node)) if state != "skipped" else {}  # its job's, which others were made in
    step = f"{progress['done']}/{progress['total']}" if progress else ""
    return Standing(node.name, state, reason, took, step, log)


def _state(plan: Plan, node: Node, task: Task | None, found: Mapping[str, Standing]) -> tuple[str, str]:
    if task and task.is_running:
        return "running", f"on {task.nodes}"
    if task and task.is_waiting:
        return "waiting", task.reason
    if owner := living_owner(plan.store.partial(node.id)):
        return "running", f"on {owner.get('host')}"
    before = [found[artifact_id].state for artifact_id in node.inputs.values()]
    if any(state in ("failed", "skipped") for state in before) or (task and task.reason == NEVER):
        return "skipped", "it needs what failed"
    word = _read(plan.failure_path(node))
    if word and word.get("exit_code") != Preempted.exit_code:
        return "failed", str(word.get("message", ""))
    if task and task.state.startswith("CANCELLED"):
        return "cancelled", ""
    if task:
        return "failed", why(task, node.stage, plan.log_path(node))
    return "waiting", "it goes on from its checkpoint" if word else ""


def run_folder(told: str) -> Plan:
    """Reads the plan of a run's folder, `runs/legal`.

    Raises:
        ArtifactError: if it is none.
    """
    from qlora_dist.pipeline.plan import PLAN, read_plan

    if "://" in told:
        return read_plan(told if told.endswith(PLAN) else f"{told.rstrip('/')}/{PLAN}")
    folder = Path(told)
    if not (folder / PLAN).exists():
        raise ArtifactError(f"{folder} is no run's folder: it has no {PLAN}. Give one, as runs/legal.")
    return read_plan(folder / PLAN)


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
