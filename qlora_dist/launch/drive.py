"""Driving a plan through a launcher, from the lock of the run's folder to the table of scores."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_dist.artifacts.objects import is_url, require_writable
from qlora_dist.artifacts.owner import OwnedError, describe
from qlora_dist.config.run import RunConfig
from qlora_dist.errors import ArtifactError, LaunchError
from qlora_dist.launch.base import Job, Launcher, State
from qlora_dist.launch.closing import closing_job
from qlora_dist.launch.jobs import forget_failures, make_jobs, node_states
from qlora_dist.launch.open import opened
from qlora_dist.launch.screen import Screen, certificate_table, clock, plan_table
from qlora_dist.launch.slurm.shape import CLOSE
from qlora_dist.pipeline.close import Ending, close_run, ending_of, is_closed, serve_command
from qlora_dist.pipeline.nodes import make_plan, unread_keys
from qlora_dist.pipeline.plan import Plan, drift, read_plan
from qlora_dist.pipeline.publish import claimed, publish

POLL_S = 0.2

GATE_FAILED = 3
"""The exit code of a run that finished, but whose model does not pass `evaluate.gate=strict`."""

INTERRUPTED = 130


def run(config: RunConfig, command: str, console: Console) -> int:
    """Plans and runs one config; returns the exit code: 0, 1 when a node failed, 3 at the gate, 130 when interrupted.

    Raises:
        QloraDistError: for what is wrong before any work.
    """
    plan = make_plan(config, command)
    plan.notes += unread_keys(config, _set_keys(command))
    before = _previous(plan)
    if is_url(plan.root):
        require_writable(plan.root)
    finished = plan.store.finished(node.id for node in plan.nodes)
    cached = {node.name: node.id in finished for node in plan.nodes}
    moved = drift(plan, before)
    if config.plan_only:
        console.print(plan_table(plan, cached, moved))
        _say_notes(plan, console)
        return 0
    if all(cached.values()) and is_closed(plan):
        console.print(f"Nothing to do: all {len(plan.nodes)} nodes are finished, and nothing they read has changed.")
        return _show_results(plan, _read_summary(plan), console)
    to_run = [node for node in plan.nodes if not cached[node.name]]
    try:
        with opened(plan, config.launcher) as (launcher, machine):
            jobs = make_jobs(plan, to_run, machine, _model_bytes(plan))
            launcher.check(jobs)
            if launcher.outlives and jobs:
                jobs.append(closing_job(plan, jobs))
            _writable(plan.folder)
            with claimed(plan, f"launch {plan.experiment}"):
                publish(plan, [plan.write()])
                forget_failures(plan, finished)
                _say_drift(moved, console)
                _say_notes(plan, console)
                return _drive(plan, launcher, jobs, console)
    except OwnedError as error:
        repair = "Wait for it or end it, or give this run a name of its own: name=<other>."
        raise LaunchError(f"{plan.folder} is being run by {describe(error.owner)}. {repair}") from error


def _drive(plan: Plan, launcher: Launcher, jobs: Sequence[Job], console: Console) -> int:
    """Runs the jobs to their end, closes the run, and says how it went."""
    to_run = {name for job in jobs for name in job.nodes}
    states = {name: State.cached for name in plan.names() if name not in to_run}
    started = time.monotonic()
    screen = Screen(plan, console)
    try:
        console.print(f"{len(to_run)} of {len(plan.nodes)} nodes to run; logs in {plan.folder / 'logs'}")
        with screen:
            screen.update(states)
            for job in jobs:
                launcher.submit(job)
            told = launcher.poll()
            while not all(told[job.name].has_ended for job in jobs):
                screen.update(states | node_states(plan, jobs, told))
                time.sleep(POLL_S)
                told = launcher.poll()
            states |= node_states(plan, jobs, told)
            screen.update(states)
    except KeyboardInterrupt:
        _leave(plan, launcher, console)
        return INTERRUPTED
    except BaseException:
        if not launcher.outlives:
            launcher.cancel()
        raise
    endings = {
        node.name: ending_of(plan, node, states[node.name].name, screen.seconds.get(node.name, 0))
        for node in plan.nodes
    }
    _say_failures(plan, endings, console)
    is_closed_there = told.get(CLOSE) is State.done
    summary = _read_summary(plan) if is_closed_there else close_run(plan, endings)
    console.print(f"Took {clock(time.monotonic() - started)}.")
    return _show_results(plan, summary, console)


def _leave(plan: Plan, launcher: Launcher, console: Console) -> None:
    """Ends the jobs at an interrupt, or leaves them to run on where they do."""
    if launcher.outlives:
        commands = f"python -m qlora_dist.status {plan.folder}, or python -m qlora_dist.cancel {plan.folder}"
        console.print(f"The jobs go on without this command, to the report: {commands}", soft_wrap=True)
        return
    launcher.cancel()
    console.print("Interrupted. What is finished stays; the same command goes on from there.")


def _show_results(plan: Plan, summary: dict[str, Any], console: Console) -> int:
    from qlora_dist.evaluate.report import difference_table, score_table

    if certificate := certificate_table(summary):
        console.print(certificate)
    if summary["scores"]:
        console.print(score_table(summary))
    if compared := difference_table(summary):
        console.print(compared)
    for note in (note for note in summary["notes"] if note not in plan.notes):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    if summary.get("sweep"):
        console.print(Text(f"sweep    {summary['sweep']['text']}"), soft_wrap=True)
    console.print(f"report   {plan.folder / 'report.html'}", soft_wrap=True)
    console.print(f"summary  {plan.folder / 'summary.json'}", soft_wrap=True)
    if is_url(plan.root):
        console.print(f"kept at  {plan.root}/{plan.experiment}", soft_wrap=True)
    if summary["adapter"]:
        console.print(f"adapter  {summary['adapter']}", soft_wrap=True)
        console.print(Text(f"use it   {summary['use']}"), soft_wrap=True)
        console.print(Text(f"serve it {serve_command(plan)}"), soft_wrap=True)
    if summary["state"] != "done":
        return 1
    return _say_verdict(plan, summary.get("verdict"), console)


def _say_verdict(plan: Plan, verdict: dict[str, Any] | None, console: Console) -> int:
    """Prints whether the merged adapter should be shipped; returns 3 if not and `evaluate.gate=strict`."""
    is_strict = plan.config["evaluate"]["gate"] == "strict"
    if verdict is None:
        if is_strict:
            console.print("verdict  none: evaluate.gate=strict, but no merged adapter and base were scored.")
        return GATE_FAILED if is_strict else 0
    words = "ship" if verdict["ship"] else "do not ship"
    console.print(Text(f"verdict  {words}", style="bold green" if verdict["ship"] else "bold yellow"))
    for reason in verdict["reasons"]:
        mark = "passed" if reason["passed"] else "failed"
        console.print(Text(f"   {mark}: {reason['check']}: {reason['found']}"), soft_wrap=True)
    return GATE_FAILED if is_strict and not verdict["ship"] else 0


def _say_failures(plan: Plan, endings: dict[str, Ending], console: Console) -> None:
    for node in plan.nodes:
        ending = endings[node.name]
        if ending.error:
            console.print(Text(f"failed: {node.name}: {ending.error}", style="bold red"), soft_wrap=True)
            console.print(Text(f"   log: {plan.log_path(node)}"), soft_wrap=True)
    skipped = [name for name, ending in endings.items() if ending.state == "skipped"]
    if skipped:
        console.print(Text(f"skipped, since they need what failed: {', '.join(skipped)}", style="yellow"))
    if any(ending.error for ending in endings.values()):
        console.print(Text(f"Mend what is said above; what is finished stays. Then: {plan.command}"), soft_wrap=True)


def _say_drift(moved: dict[str, list[str]], console: Console) -> None:
    for name, reasons in moved.items():
        own = [reason for reason in reasons if not reason.startswith("through ")]
        if own:
            console.print(Text(f"changed since last time: {name}: {'; '.join(own)}", style="yellow"))


def _set_keys(command: str) -> list[str]:
    words = (word.lstrip("+") for word in shlex.split(command))
    return [word.partition("=")[0] for word in words if "=" in word and not word.startswith("-")]


def _say_notes(plan: Plan, console: Console) -> None:
    for note in plan.notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _previous(plan: Plan) -> Plan | None:
    try:
        return read_plan(plan.address)
    except ArtifactError:
        return None  # the first run, or a plan of an older version


def _read_summary(plan: Plan) -> dict[str, Any]:
    import json

    summary: dict[str, Any] = json.loads((plan.folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"root={folder.parent}: it can't be written ({error.strerror}). Set root= to a folder of yours."
        raise LaunchError(message) from error
    return folder


def _model_bytes(plan: Plan) -> int:
    """Returns the size of the base's weight files, 0 for the embedded one or one that is still on the hub."""
    folder = Path(plan.config["model"]["path"]).expanduser()
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if plan.config["model"]["path"] else 0
