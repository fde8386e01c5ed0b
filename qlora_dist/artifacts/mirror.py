"""A copy, at a URL, of the folder that a stage continues in, so that its next life may be on another machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_dist.artifacts.objects import Objects


class Mirror:
    """Keeps what lies at a URL like a folder of this machine. Hidden files stay here."""

    def __init__(self, objects: Objects, at: str, folder: Path) -> None:
        self._objects, self._at, self._folder = objects, at, folder
        self._pushed: dict[str, tuple[int, int]] = {}

    def push(self) -> None:
        """Copies what is new or changed since the last push, new files first; then removes what is gone here."""
        here = self._here()
        changed = [name for name, stamp in here.items() if self._pushed.get(name) != stamp]
        there = self._objects.walk(self._at)
        for name in changed:
            try:
                self._objects.upload(self._folder, [name], self._at)
                self._pushed[name] = here[name]
            except FileNotFoundError:  # a checkpoint that a newer one has replaced meanwhile
                continue
        self._objects.remove(f"{self._at}/{name}" for name in there if name not in here)

    def fetch(self) -> None:
        """Makes the folder like what lies at the URL, if anything does."""
        there = self._objects.walk(self._at)
        if not there:
            return
        for path in self._folder.iterdir():
            if path.name.startswith("."):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._objects.download(self._at, there, self._folder)

    def remove(self) -> None:
        """Removes the copy."""
        self._objects.remove(f"{self._at}/{name}" for name in self._objects.walk(self._at))

    def _here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder).as_posix()
            if any(part.startswith(".") for part in path.relative_to(self._folder).parts) or not path.is_file():
                continue
            stat = path.stat()
            found[name] = (stat.st_size, stat.st_mtime_ns)
        return found
