"""Who makes an artifact that is kept at a URL: a lock of numbered objects, of which the highest is the owner's.

Nobody ever writes over another's object. A lock is taken by creating number n + 1, which one alone can do (see
`Objects.create`); its holder rewrites its own object as a heartbeat, and looks, before it finishes anything, whether a
higher one has come. An owner that is silent for `SILENT_S` on the store's clock is passed over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qlora_dist.artifacts.objects import Objects
from qlora_dist.artifacts.owner import OwnedError
from qlora_dist.runtime import log

BEAT_S = 20.0
SILENT_S = 120.0


class Lock:
    """One lock, as one process sees it."""

    def __init__(self, objects: Objects, folder: str, job: str, silent_s: float = SILENT_S) -> None:
        self._objects, self._folder, self._silent_s = objects, folder, silent_s
        self._me: dict[str, Any] = {
            "job": job,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
        }
        self._number = 0

    @property
    def token(self) -> str:
        """Names this owner alone."""
        return str(self._me["token"])

    def take(self) -> dict[str, Any]:
        """Takes the lock and returns what its last owner left of itself, empty if there was none.

        Raises:
            OwnedError: if another is alive, or was quicker.
        """
        number, owner = last_owner(self._objects, self._folder)
        if owner and not owner.get("released") and self._is_alive(number):
            raise OwnedError(owner)
        if not self._objects.create(_name(self._folder, number + 1), self._said()):
            raise OwnedError(last_owner(self._objects, self._folder)[1] or {"job": "unknown"})
        self._number = number + 1
        return owner

    def beat(self) -> None:
        """Says that the owner lives."""
        self._objects.write(_name(self._folder, self._number), self._said())

    def is_mine(self) -> bool:
        """Says that nobody has taken the lock over meanwhile."""
        number, owner = last_owner(self._objects, self._folder)
        return number == self._number and owner.get("token") == self._me["token"]

    def release(self) -> None:
        """Leaves word that the owner has gone; the numbers go on from there."""
        if self.is_mine():
            self._objects.write(_name(self._folder, self._number), self._said(released=True))

    def remove(self) -> None:
        """Removes every object of the lock: what it guarded is finished."""
        self._objects.remove(f"{self._folder}/{name}" for name in _numbers(self._objects, self._folder).values())

    def _is_alive(self, number: int) -> bool:
        beaten = self._objects.modified(_name(self._folder, number))
        return now(self._objects, self._folder) - beaten < self._silent_s

    def _said(self, **more: Any) -> bytes:
        return json.dumps(self._me | more).encode()


@contextmanager
def held(objects: Objects, folder: str, job: str) -> Iterator[Lock]:
    """Holds a lock inside the `with` block.

    Raises:
        OwnedError: if another is alive.
    """
    lock = Lock(objects, folder, job)
    lock.take()
    with beating(lock.beat):
        try:
            yield lock
        finally:
            lock.release()


@contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """Calls `beat` every `BEAT_S` inside the `with` block; a store that can't be reached is tried again."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(BEAT_S):
            try:
                beat()
            except Exception as error:  # whatever the store's library raises; a silent lock is lost, no more
                log.warning("the store can't be reached (%s); trying again", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def last_owner(objects: Objects, folder: str) -> tuple[int, dict[str, Any]]:
    """Returns the number and the words of the latest owner, 0 and nothing if there never was one."""
    numbers = _numbers(objects, folder)
    if not numbers:
        return 0, {}
    last = max(numbers)
    return last, objects.read_json(_name(folder, last)) or {"job": "unknown"}


def living_owner(objects: Objects, folder: str) -> dict[str, Any] | None:
    """Returns the owner that holds a lock now, None if nobody does."""
    number, owner = last_owner(objects, folder)
    if not number or owner.get("released"):
        return None
    silent_s = now(objects, folder) - objects.modified(_name(folder, number))
    return owner if silent_s < SILENT_S else None


def now(objects: Objects, folder: str) -> float:
    """Reads the store's own clock: hosts' clocks differ."""
    probe = f"{folder}/clock-{uuid.uuid4().hex}"
    objects.write(probe, b"")
    try:
        return objects.modified(probe)
    finally:
        objects.remove([probe])


def _name(folder: str, number: int) -> str:
    return f"{folder}/owner-{number:08d}.json"


def _numbers(objects: Objects, folder: str) -> dict[int, str]:
    found = (name for name in objects.names(folder) if name.startswith("owner-"))
    return {int(name[6:14]): name for name in found}
