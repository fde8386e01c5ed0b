"""The folder of artifacts: each is made in a `.partial` folder with one owner, and finished by one rename."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.artifacts.fingerprint import file_digest
from qlora_dist.artifacts.owner import living_owner, lost_to, owned
from qlora_dist.errors import ArtifactError
from qlora_dist.runtime import write_json

MANIFEST = "manifest.json"


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What an artifact is, what it was made from and how, and the digest of every file in it."""

    stage: str
    label: str
    key: str
    version: int
    recipe: dict[str, Any]
    inputs: dict[str, str]
    leaves: dict[str, str]
    execution: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The artifact's name below the store: `<stage>/<label>-<key>`."""
        return f"{self.stage}/{self.label}-{self.key}"


class Store:
    """All artifacts of one root, by `<stage>/<label>-<key>`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, artifact_id: str) -> Path:
        """Returns where a finished artifact lies (whether or not it is there)."""
        return self.root / artifact_id

    def partial(self, artifact_id: str) -> Path:
        """Returns where an artifact is made: the same folder in every life of its node."""
        return self.root / f"{artifact_id}.partial"

    def owned(self, artifact_id: str, job: str, *, resumes: bool = False) -> AbstractContextManager[None]:
        """Owns the making of an artifact inside the `with` block; `resumes` says that its partial folder is of use.

        Raises:
            OwnedError: if a live process owns it.
        """
        return owned(self.partial(artifact_id), job)

    def living_owner(self, artifact_id: str) -> dict[str, Any] | None:
        """Returns who makes an artifact now, None if nobody does."""
        return living_owner(self.partial(artifact_id))

    def lost_to(self, artifact_id: str) -> dict[str, Any] | None:
        """Returns who owns now what this process owned; None if it still does."""
        return lost_to(self.partial(artifact_id))

    def has(self, artifact_id: str) -> bool:
        """Says whether a finished artifact is there, by one look, without a check."""
        return self.folder(artifact_id).exists()

    def finished(self, artifact_ids: Iterable[str]) -> set[str]:
        """Returns which of these are finished.

        Raises:
            ArtifactError: as `is_finished`.
        """
        return {artifact_id for artifact_id in artifact_ids if self.is_finished(artifact_id)}

    def fetch(self, artifact_id: str) -> Path:
        """Returns the folder of a finished artifact, on this machine."""
        return self.folder(artifact_id)

    def is_finished(self, artifact_id: str) -> bool:
        """Says whether an artifact is there, whole by its manifest's list of sizes.

        Raises:
            ArtifactError: if the folder is there but its manifest or a file is not as it was written.
        """
        folder = self.folder(artifact_id)
        if not folder.exists():
            return False
        manifest = self.manifest(artifact_id)
        for name, entry in manifest.files.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise damaged(folder, f"{name} {found}, {entry['bytes']} were written")
        return True

    def manifest(self, artifact_id: str) -> Manifest:
        """Reads the manifest of a finished artifact.

        Raises:
            ArtifactError: if it is absent, unreadable, or of another artifact.
        """
        path = self.folder(artifact_id) / MANIFEST
        try:
            manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise damaged(path.parent, f"{MANIFEST} can't be read ({error})") from error
        if manifest.id != artifact_id:
            raise damaged(path.parent, f"{MANIFEST} is of {manifest.id}")
        return manifest

    def verify(self, artifact_id: str) -> None:
        """Reads every byte of an artifact and compares it with the manifest's digests.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        self.is_finished(artifact_id)
        folder = self.folder(artifact_id)
        for name, entry in self.manifest(artifact_id).files.items():
            if file_digest(folder / name) != entry["sha256"]:
                raise damaged(folder, f"the bytes of {name} are not those that were written")

    def commit(self, manifest: Manifest) -> Path:
        """Finishes what lies in the `.partial` folder: digests, manifest last, one rename.

        The folder's hidden files (owner, locks) are left out. Returns the finished folder.
        """
        partial, final = self.partial(manifest.id), self.folder(manifest.id)
        manifest.files = _describe_files(partial)
        write_json(partial / MANIFEST, dataclasses.asdict(manifest))
        _sync(partial)
        try:
            partial.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(partial, ignore_errors=True)  # the same recipe, finished elsewhere meanwhile
        for hidden in final.glob(".*"):
            hidden.unlink(missing_ok=True)
        return final

    def inputs(self, named: Mapping[str, str]) -> dict[str, Path]:
        """Returns the folder of each input, by its name.

        Raises:
            ArtifactError: if one is not finished.
        """
        absent = [artifact_id for artifact_id in named.values() if not self.is_finished(artifact_id)]
        if absent:
            raise ArtifactError(f"{self.folder(absent[0])} is not finished. Run the command again to make it.")
        return {name: self.fetch(artifact_id) for name, artifact_id in named.items()}


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.relative_to(folder).parts[0].startswith("."))
    named = {p.relative_to(folder).as_posix(): p for p in files if p.name != MANIFEST}
    for path in named.values():
        path.chmod(0o644)  # safetensors are born 0600, which hides them from others on a shared disk
    return {name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for name, path in named.items()}


def _sync(folder: Path) -> None:
    for path in (folder / MANIFEST, folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def damaged(folder: object, what: str) -> ArtifactError:
    """Builds the complaint about an artifact that is not as it was written."""
    return ArtifactError(f"{folder} is damaged: {what}. Delete that folder, and the next run makes it again.")
