"""A W&B run that is quiet, light and safe to kill: what it logged stands in its file within two seconds."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

from qlora_dist.runtime import Made
from qlora_dist.tracking.picture import matrix_picture

FLUSH_INTERVAL_S = 2.0
"""A killed run loses at most this much."""

INIT_TIMEOUT_S = 30.0
"""How long a server may take to answer before the run is logged offline."""

SILENT_FILE, SILENT_S = "unreachable", 600.0
"""A server that didn't answer is not asked again for so long: not each node of a run waits for it."""

log = logging.getLogger("qlora_dist")
_open: list[str] = []
"""The ids of this process's open runs: lanes that train together have one each."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Run:
    """Who a run is: its name, its id (the recipe's key), its group (experiment) and its job type (stage)."""

    name: str
    run_id: str
    group: str
    job_type: str
    recipe: Mapping[str, Any]


class WandbSink:
    """A sink that logs each step's values to a W&B run, against a step of its own.

    A resumed offline run is a segment whose inner counter starts at 0 again; the `step` metric does not.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of one step."""
        self.run.log({"step": step, **values})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table, which W&B sorts, filters and joins over runs."""
        self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def log_image(self, name: str, pixels_HWC: Any) -> None:
        """Logs an image."""
        self.run.log({name: wandb.Image(pixels_HWC)})

    def log_made(self, made: Made, made_from: Sequence[Made]) -> None:
        """Logs the artifact as this run's output and its parents as inputs; what was found goes to the summary.

        An artifact holds its manifest, which names every file's bytes: weights stay where they are. Whoever made it
        and whoever reads it log the same bytes, so the server knows them as one.
        """
        self.run.summary.update({name: value for name, value in made.facts.items() if isinstance(value, (int, float))})
        for name, value in made.facts.items():
            if rows := _rows(value):
                self.log_table(name, list(rows[0]), [[_cell(row.get(c)) for c in rows[0]] for row in rows])
        for name, value in made.facts.items():
            if names := _names_of_square(value, made.facts):
                self.log_image(name, matrix_picture(value, names))
        for parent in made_from:
            # `use_artifact` refuses to work offline; this is what it does, without waiting for a server.
            self.run._log_artifact(_artifact(parent), aliases=[parent.key], is_user_created=True, use_after_commit=True)
        self.run.log_artifact(_artifact(made), aliases=[made.key])


def _artifact(made: Made) -> wandb.Artifact:
    about = {"key": made.key, "folder": str(made.manifest.parent)}
    artifact = wandb.Artifact(_safe(f"{made.stage}-{made.label}"), type=made.stage, metadata=about)
    artifact.add_file(str(made.manifest), policy="immutable", skip_cache=True)  # finished artifacts never change
    return artifact


def _safe(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)[:128]


def _rows(value: Any) -> list[dict[str, Any]]:
    is_table = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    return value if is_table else []


def _names_of_square(value: Any, facts: Mapping[str, Any]) -> list[str]:
    """Returns names for the rows of a square matrix of numbers (the parts of a merge); none for what is no matrix."""
    is_square = isinstance(value, list) and value and all(isinstance(r, list) and len(r) == len(value) for r in value)
    if not is_square or not all(isinstance(v, (int, float)) for row in value for v in row):
        return []
    labels = [str(row.get("label", i)) for i, row in enumerate(_rows(facts.get("parts")))]
    return labels if len(labels) == len(value) else [str(i) for i in range(len(value))]


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool)) else json.dumps(value)


@contextmanager
def open_run(run: Run, *, project: str, folder: Path, online: bool) -> Iterator[WandbSink]:
    """Opens a W&B run and finishes it at the end, as failed when the block raises.

    Without `WANDB_API_KEY`, or when the server can't be reached, the run is kept offline for `wandb sync`.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # the log-in speaks before any run's settings are read
    opened = _start(run, project, folder, online=online)
    _open.append(run.run_id)
    code = 1
    try:
        yield WandbSink(opened)
        code = 0
    finally:
        opened.finish(exit_code=code)
        _open.remove(run.run_id)
        if not _open:
            wandb.teardown()  # ends W&B's own process, which else goes on holding the run's id


def _start(run: Run, project: str, folder: Path, *, online: bool) -> Any:
    if online and not os.environ.get("WANDB_API_KEY"):
        log.warning(
            "WANDB_API_KEY isn't set: %s is logged offline. Upload it with: wandb sync %s/wandb/*", run.name, folder
        )
        online = False
    silent = folder / "wandb" / SILENT_FILE
    if online and silent.exists() and time.time() - silent.stat().st_mtime < SILENT_S:
        online = False
    if online:
        try:
            return _init(run, project, folder, "online")
        except wandb.Error as error:
            silent.parent.mkdir(exist_ok=True)
            silent.touch()
            log.warning("W&B can't be reached (%s): %s is logged offline. Upload it with: wandb sync", error, run.name)
            wandb.teardown()
    return _init(run, project, folder, "offline")


def _init(run: Run, project: str, folder: Path, mode: Literal["online", "offline"]) -> Any:
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        init_timeout=INIT_TIMEOUT_S,
    )
    return wandb.init(
        project=project,
        dir=str(folder),
        id=run.run_id,
        name=run.name,
        group=run.group,
        job_type=run.job_type,
        config=dict(run.recipe),
        resume="allow" if mode == "online" else None,  # offline, the id alone joins the segments on upload
        mode=mode,
        reinit="create_new",
        settings=settings,
    )
