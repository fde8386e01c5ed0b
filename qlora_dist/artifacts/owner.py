"""Who works in a folder: one live process at a time, known by host, pid and start, and by a beating heart."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from qlora_dist.errors import ArtifactError
from qlora_dist.runtime import write_json

OWNER = ".owner.json"
BEAT_S = 5.0
SILENT_S = 60.0
"""An owner on another host that has not touched its file for this long is dead."""


class OwnedError(ArtifactError):
    """Somebody else, alive, owns the folder; `owner` says who."""

    def __init__(self, owner: dict[str, Any]) -> None:
        super().__init__(describe(owner))
        self.owner = owner


def describe(owner: dict[str, Any]) -> str:
    """Names an owner as a person would look for it."""
    return f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('job')})"


@contextmanager
def owned(folder: Path, job: str) -> Iterator[None]:
    """Owns `folder` inside the `with` block; takes over from a dead owner.

    Raises:
        OwnedError: if a live process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _guard(folder):
        owner = living_owner(folder)
        if owner is not None:
            raise OwnedError(owner)
        write_json(folder / OWNER, _myself(job))
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder / OWNER, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        (folder / OWNER).unlink(missing_ok=True)  # gone already if the folder was renamed on commit


def living_owner(folder: Path) -> dict[str, Any] | None:
    """Returns the live owner of a folder, or None if nobody, or only a dead process, owns it."""
    try:
        owner: dict[str, Any] = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        age_s = _clock(folder) - (folder / OWNER).stat().st_mtime
    except (OSError, ValueError):
        return None
    if owner.get("host") != socket.gethostname():
        return owner if age_s < SILENT_S else None
    try:
        alive = psutil.Process(owner["pid"]).create_time() == owner["started"]
        alive = alive and psutil.Process(owner["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        alive = False
    return owner if alive else None


def require_mine(folder: Path) -> None:
    """Passes if this process owns a folder, or nobody does.

    Raises:
        OwnedError: if another process has taken it over, having thought this one dead.
    """
    try:
        owner: dict[str, Any] = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if "pid" in owner and (owner["host"], owner["pid"]) != (socket.gethostname(), os.getpid()):
        raise OwnedError(owner)


def _myself(job: str) -> dict[str, Any]:
    started = psutil.Process().create_time()
    return {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "started": started}


def _clock(folder: Path) -> float:
    """Reads the clock of the file system itself: hosts' clocks differ."""
    probe = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        if path.exists():
            os.utime(path)


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Serialises who may look and take: two processes must not both find the owner dead."""
    with (folder / ".guard").open("w") as file:
        for _ in range(600):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
