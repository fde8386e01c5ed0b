"""A W&B run that is quiet, light and safe to kill: what it logged stands in its file within two seconds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb

FLUSH_INTERVAL_S = 2.0
"""A killed run loses at most this much."""

INIT_TIMEOUT_S = 30.0
"""How long a server may take to answer before the run is logged offline."""

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
    if online:
        try:
            return _init(run, project, folder, "online")
        except wandb.Error as error:
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
