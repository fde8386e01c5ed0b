"""Who works in a folder: one live process at a time, known by host, pid and start, and by a beating heart."""

from __future__ import annotations

import contextlib
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

from qlora_dist.errors import ArtifactError, Preempted
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


class Host:
    """A machine as ownership sees it: who works here, who is alive, what the file system's clock says."""

    def myself(self) -> dict[str, Any]:
        """Names this process as no other, on this machine or another, at any time."""
        started = psutil.Process().create_time()
        return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}

    def is_alive(self, owner: dict[str, Any], folder: Path) -> bool:
        """Says whether an owner still works: on this machine the process table knows, elsewhere its heart is felt."""
        if owner.get("host") != self.myself()["host"]:
            return self.now(folder) - (folder / OWNER).stat().st_mtime < SILENT_S
        try:
            process = psutil.Process(owner["pid"])
            return process.create_time() == owner["started"] and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def now(self, folder: Path) -> float:
        """Reads the clock of the file system itself: hosts' clocks differ."""
        probe = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def touch(self, path: Path) -> None:
        """Lets a file say that its owner lives."""
        os.utime(path)

    @contextmanager
    def beating(self, folder: Path, me: dict[str, Any]) -> Iterator[None]:
        """Keeps the owner's heart beating inside the `with` block."""
        stop = threading.Event()
        thread = threading.Thread(target=_keep_beating, args=(folder, me, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


HOST = Host()
"""The machine this process is on; simulations put another in its place."""


@contextmanager
def owned(folder: Path, job: str) -> Iterator[None]:
    """Owns `folder` inside the `with` block; takes over from a dead owner.

    Raises:
        OwnedError: if a live process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = HOST.myself() | {"job": job}
    with _guard(folder):
        owner = living_owner(folder)
        if owner is not None:
            raise OwnedError(owner)
        write_json(folder / OWNER, me)
        HOST.touch(folder / OWNER)
    try:
        with HOST.beating(folder, me):
            yield
    finally:
        if _is_of(_read(folder), me):  # else it was renamed on commit, or taken over
            (folder / OWNER).unlink(missing_ok=True)


def living_owner(folder: Path) -> dict[str, Any] | None:
    """Returns the live owner of a folder, or None if nobody, or only a dead process, owns it."""
    owner = _read(folder)
    try:
        return owner if owner and HOST.is_alive(owner, folder) else None
    except OSError:
        return None


def lost_to(folder: Path) -> dict[str, Any] | None:
    """Returns who took over a folder that this process owned, as far as is known; None if it still does."""
    owner = _read(folder)
    return None if _is_of(owner, HOST.myself()) else owner or {"job": "gone again"}


def _is_of(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    return all(owner.get(name) == me[name] for name in ("host", "pid", "started"))


def _read(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def beat(folder: Path, me: dict[str, Any]) -> bool:
    """Touches the owner's file; answers False if another process has taken the folder over, or did and has gone."""
    if not _is_of(_read(folder), me):
        return not folder.exists()  # renamed on commit
    with contextlib.suppress(OSError):  # renamed on commit a moment ago
        HOST.touch(folder / OWNER)
    return True


def _keep_beating(folder: Path, me: dict[str, Any], stop: threading.Event) -> None:
    """Beats; a process that was away for so long that another took over ends at once."""
    while not stop.wait(BEAT_S):
        if not beat(folder, me) and not stop.is_set():
            owner = describe(_read(folder))
            print(f"error: {folder} was taken over by {owner}: this process was silent for too long", flush=True)
            os._exit(Preempted.exit_code)


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
