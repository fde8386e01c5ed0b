"""What a person sees while a plan runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qlora_dist.launch.base import State
from qlora_dist.pipeline.plan import Plan

STYLES = {
    State.waiting: "dim",
    State.running: "bold cyan",
    State.cached: "green",
    State.done: "green",
    State.failed: "bold red",
    State.skipped: "yellow",
    State.cancelled: "yellow",
}
PLAIN_EVERY_S = 15.0


class Screen:
    """Shows the state of each node; `update` is called a few times a second."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._states: dict[str, State] = {}
        self._started: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._told: float = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._table())
            self._live.stop()

    @property
    def seconds(self) -> Mapping[str, float]:
        """How long each ended node took on this screen's clock."""
        return self._seconds

    def update(self, states: Mapping[str, State]) -> None:
        """Takes note of the states and shows what changed."""
        now = time.monotonic()
        for name, state in states.items():
            if self._states.get(name) is state:
                continue
            self._states[name] = state
            if state is State.running:
                self._started[name] = now
            elif state.has_ended:
                self._seconds[name] = now - self._started.get(name, now)
            if not self._live and state is not State.waiting:
                self._say(name, state)
        if self._live:
            self._live.update(self._table())
        elif now - self._told > PLAIN_EVERY_S:
            self._told = now
            for names in self._running().values():
                self._say(names[0], State.running, beside=len(names) - 1)

    def _running(self) -> dict[Path, list[str]]:
        """Returns the nodes that run, together those of one job: they have one progress."""
        jobs: dict[Path, list[str]] = {}
        for name, state in self._states.items():
            if state is State.running:
                jobs.setdefault(self._plan.progress_path(self._plan.node(name)), []).append(name)
        return jobs

    def _say(self, name: str, state: State, beside: int = 0) -> None:
        ended = sum(s.has_ended for s in self._states.values())
        values = self._values(name) if state is State.running else {}
        detail = " ".join(f"{key} {value}" for key, value in values.items() if value)
        took = f" in {self._seconds[name]:.1f} s" if state in (State.done, State.failed) else ""
        others = f" and {beside} beside it" if beside else ""
        line = f"[{ended}/{len(self._plan.nodes)}] {state.name} {name}{others}{took} {detail}".rstrip()
        self._console.print(Text(line, style=STYLES[state]), soft_wrap=True)

    def _values(self, name: str) -> dict[str, str]:
        progress = _read(self._plan.progress_path(self._plan.node(name)))
        if not progress:
            return {}
        loss, speed, lanes = (progress.get(key) for key in ("loss", "tokens_per_s", "lanes"))
        of = f" (median of {lanes})" if lanes else ""
        return {
            progress.get("unit", "step"): f"{progress['done']}/{progress['total']}",
            "loss": f"{loss:.3f}{of}" if loss is not None else "",
            "tokens/s": f"{speed:,.0f}" if speed else "",
            "left": clock(progress.get("left_s", 0)) if progress["done"] else "",
        }

    def _table(self) -> Table:
        table = Table(title=f"{self._plan.experiment}", title_justify="left", box=None, pad_edge=False)
        for column, justify in (("node", "left"), ("state", "left"), ("time", "right"), ("step", "right")):
            table.add_column(column, justify="right" if justify == "right" else "left", no_wrap=True)
        for column in ("loss", "tokens/s", "left"):
            table.add_column(column, justify="right", no_wrap=True)
        now, first_of = time.monotonic(), {names[0] for names in self._running().values()}
        for node in self._plan.nodes:
            state = self._states.get(node.name, State.waiting)
            values = list(self._values(node.name).values()) if node.name in first_of else []
            took = now - self._started[node.name] if state is State.running else self._seconds.get(node.name, 0.0)
            cells = [clock(took) if took >= 0.5 else "", *(values or ["", "", "", ""])]
            table.add_row(node.name, Text(state.name, style=STYLES[state]), *cells)
        return table


def clock(seconds: float) -> str:
    """Writes a duration as people say it: `42 s`, `3:05`, `2:10:00`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plan_table(plan: Plan, cached: Mapping[str, bool], moved: Mapping[str, list[str]]) -> Table:
    """Lists each node of a plan: label, key, cached or to run, the job it shares, and what changed since last time."""
    table = Table(title=f"Plan of {plan.experiment}: {plan.folder}", title_justify="left", box=None, pad_edge=False)
    for column in ("node", "key", "state", "job", "changed since last time"):
        table.add_column(column, no_wrap=column != "changed since last time")
    for node in plan.nodes:
        state = Text("cached", style="green") if cached[node.name] else Text("to run", style="bold")
        table.add_row(node.name, node.key, state, Text(node.group), Text("; ".join(moved.get(node.name, []))))
    return table


def certificate_table(summary: Mapping[str, Any]) -> Table | None:
    """Lists what was checked of the run's trainings: each check, how many passed it, and what was found of the first.

    Returns nothing where nothing was trained. What was found of each one is in its manifest and in the report.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for node in summary["nodes"]:
        certificate = node.get("facts", {}).get("certificate", ())
        for row in certificate if isinstance(certificate, (list, tuple)) else ():
            found.setdefault(row["check"], []).append(row)
    if not found:
        return None
    table = Table(title="Certificate of what was trained", title_justify="left", box=None, pad_edge=False)
    for column, justify in (("check", "left"), ("passed", "right"), ("found", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left", no_wrap=column == "passed")
    for check, rows in found.items():
        passed = sum(bool(row["passed"]) for row in rows)
        style = "green" if passed == len(rows) else "bold red"
        table.add_row(check, Text(f"{passed} of {len(rows)}", style=style), Text(str(rows[0]["found"])))
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
