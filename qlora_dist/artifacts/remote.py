"""Artifacts that are kept at a URL: made and read in a folder of this machine, finished there by their manifest.

At the URL, `<stage>/<label>-<key>/manifest.json` names the folder beside it that holds the files; each life of a maker
uploads to a folder of its own, so that files of two never mix, and the first manifest stays. What a killed life left
is in `<stage>/<label>-<key>.partial/`: the lock, and a copy of the partial folder of a stage that resumes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_dist.artifacts import lock as locks
from qlora_dist.artifacts.fingerprint import file_digest
from qlora_dist.artifacts.lock import Lock, beating
from qlora_dist.artifacts.mirror import Mirror
from qlora_dist.artifacts.objects import Objects, is_url
from qlora_dist.artifacts.owner import OwnedError, owned
from qlora_dist.artifacts.store import MANIFEST, Manifest, Store, damaged
from qlora_dist.errors import ArtifactError, Preempted

LIFE = ".life"
"""The hidden file of a partial folder that says which owner worked in it last."""
FILES_IN = "files_in"
"""The key of a manifest at a URL that names the folder of its files."""


def open_store(root: str, staging: Path) -> Store:
    """Returns the store of a root: the folder itself, or a URL's, staged in `staging`."""
    return RemoteStore(staging / "artifacts", f"{root.rstrip('/')}/artifacts") if is_url(root) else _local(root)


def _local(root: str) -> Store:
    return Store(Path(root) / "artifacts")


class RemoteStore(Store):
    """The artifacts of a root that is a URL; `root` is the folder of this machine in which they are made and read."""

    def __init__(self, root: Path, url: str) -> None:
        super().__init__(root)
        self.objects = Objects(url)
        self._locks: dict[str, Lock] = {}
        self._seen: dict[str, Manifest] = {}

    def has(self, artifact_id: str) -> bool:
        """Says whether a finished artifact is at the URL."""
        return artifact_id in self._seen or self.objects.exists(f"{artifact_id}/{MANIFEST}")

    def is_finished(self, artifact_id: str) -> bool:
        """Says whether an artifact is at the URL, which it is once its manifest is.

        Raises:
            ArtifactError: if the manifest is not as it was written.
        """
        return self.has(artifact_id) and bool(self.manifest(artifact_id))

    def finished(self, artifact_ids: Iterable[str]) -> set[str]:
        """Returns which of these are finished: one listing a stage, and a look at those that are in it."""
        wanted = set(artifact_ids)
        stages = {artifact_id.partition("/")[0] for artifact_id in wanted}
        there = {f"{stage}/{name}" for stage in stages for name in self.objects.names(stage)} & wanted
        with ThreadPoolExecutor(16) as pool:
            found = dict(zip(there, pool.map(self.is_finished, there), strict=True))
        return {artifact_id for artifact_id, is_there in found.items() if is_there}

    def manifest(self, artifact_id: str) -> Manifest:
        """Reads the manifest of a finished artifact from the URL.

        Raises:
            ArtifactError: if it is absent, unreadable, or of another artifact.
        """
        if artifact_id not in self._seen:
            self._seen[artifact_id] = self._read(artifact_id)[0]
        return self._seen[artifact_id]

    def fetch(self, artifact_id: str) -> Path:
        """Returns an artifact's folder on this machine, copied from the URL and checked if it isn't there yet.

        Raises:
            ArtifactError: if it is not finished, or its bytes are not those that were written.
        """
        folder = self.folder(artifact_id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            manifest, files_in = self._read(artifact_id)
            if folder.exists():
                if super().manifest(artifact_id).files == manifest.files:
                    return folder
                shutil.rmtree(folder)  # an older life's, of another machine's making
            aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            try:
                self.objects.download(f"{artifact_id}/{files_in}", manifest.files, aside)
                for name, entry in manifest.files.items():
                    if file_digest(aside / name) != entry["sha256"]:
                        where = f"{self.objects.url}/{artifact_id}"
                        raise damaged(where, f"the bytes of {files_in}/{name} are not those that were written")
                aside.mkdir(exist_ok=True)
                (aside / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest)), encoding="utf-8")
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return folder

    def verify(self, artifact_id: str) -> None:
        """Fetches an artifact, and compares every byte with the manifest's digests.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        self.fetch(artifact_id)
        super().verify(artifact_id)

    def commit(self, manifest: Manifest) -> Path:
        """Finishes an artifact here, uploads its files to a folder of this life's own, and its manifest last.

        Raises:
            OwnedError: if another process has taken the lock over.
        """
        held = self._locks.get(manifest.id)
        shutil.rmtree(self.folder(manifest.id), ignore_errors=True)  # of a life that never got to upload it
        folder = super().commit(manifest)
        files_in = f"files-{uuid.uuid4().hex[:12]}"
        self.objects.upload(folder, manifest.files, f"{manifest.id}/{files_in}")
        if held is not None and not held.is_mine() and not self.objects.exists(f"{manifest.id}/{MANIFEST}"):
            self._drop(manifest.id, files_in)
            raise OwnedError(locks.last_owner(self.objects, _partial(manifest.id))[1])
        said = json.dumps(dataclasses.asdict(manifest) | {FILES_IN: files_in}, indent=2, sort_keys=True)
        if not self.objects.create(f"{manifest.id}/{MANIFEST}", said.encode()):
            self._drop(manifest.id, files_in)  # the same recipe, finished elsewhere meanwhile
        return self.fetch(manifest.id)

    @contextmanager
    def owned(self, artifact_id: str, job: str, *, resumes: bool = False) -> Iterator[None]:
        """Owns the making of an artifact, here and at the URL, inside the `with` block.

        What an earlier owner left on another machine of a stage that resumes is fetched first, and what this one
        leaves is copied to the URL while it works.

        Raises:
            OwnedError: if a live process owns it.
        """
        partial = self.partial(artifact_id)
        with owned(partial, job):
            lock = Lock(self.objects, _partial(artifact_id), job)
            mirror = Mirror(self.objects, f"{_partial(artifact_id)}/files", partial) if resumes else None
            before = lock.take()
            if mirror and before and not _is_left_here(partial, before):
                mirror.fetch()
            (partial / LIFE).write_text(lock.token, encoding="utf-8")
            self._locks[artifact_id] = lock
            try:
                with beating(lambda: _beat(lock, mirror)):
                    yield
            finally:
                del self._locks[artifact_id]
                self._leave(artifact_id, lock, mirror)

    def living_owner(self, artifact_id: str) -> dict[str, Any] | None:
        """Returns who makes an artifact now, on whatever machine."""
        return locks.living_owner(self.objects, _partial(artifact_id))

    def _leave(self, artifact_id: str, lock: Lock, mirror: Mirror | None) -> None:
        if self.objects.exists(f"{artifact_id}/{MANIFEST}"):
            if mirror:
                mirror.remove()
            lock.remove()
            return
        if mirror and lock.is_mine():
            mirror.push()
        lock.release()

    def _read(self, artifact_id: str) -> tuple[Manifest, str]:
        where = f"{self.objects.url}/{artifact_id}"
        said = self.objects.read_json(f"{artifact_id}/{MANIFEST}")
        if said is None:
            raise ArtifactError(f"{where} is not finished. Run the command again to make it.")
        try:
            files_in = str(said.pop(FILES_IN))
            manifest = Manifest(**said)
        except (TypeError, KeyError) as error:
            raise damaged(where, f"{MANIFEST} can't be read ({error})") from error
        if manifest.id != artifact_id:
            raise damaged(where, f"{MANIFEST} is of {manifest.id}")
        return manifest, files_in

    def _drop(self, artifact_id: str, files_in: str) -> None:
        names = self.objects.walk(f"{artifact_id}/{files_in}")
        self.objects.remove(f"{artifact_id}/{files_in}/{name}" for name in names)


def _is_left_here(partial: Path, owner: Mapping[str, Any]) -> bool:
    """Says that the last owner worked in this very folder, so that nothing is newer elsewhere."""
    life = partial / LIFE
    return life.exists() and life.read_text(encoding="utf-8") == owner.get("token")


def _partial(artifact_id: str) -> str:
    return f"{artifact_id}.partial"


def _beat(lock: Lock, mirror: Mirror | None) -> None:
    """Beats, and copies what is new; a process that another has passed over ends, before it writes over the other's."""
    if not lock.is_mine():
        print("error: another process took this artifact over: this one was silent for too long", flush=True)
        os._exit(Preempted.exit_code)
    lock.beat()
    if mirror:
        mirror.push()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets one process of this machine at a time look for a folder and fetch it."""
    with (folder.parent / f".{folder.name}.fetch").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def resolve_root(root: str) -> str:
    """Returns a root as a plan keeps it: a URL as it is, a folder as its absolute path."""
    if is_url(root):
        return root.rstrip("/")
    return str(Path(root.removeprefix("file://")).expanduser().resolve())


def resolve_staging(staging: str) -> str:
    """Returns the folder in which roots that are URLs are staged: a path that is the same on every machine."""
    return str(Path(staging or "~/.cache/qlora_dist/staging").expanduser().resolve())


def staging_folder(root: str, staging: str) -> Path:
    """Returns the folder of this machine in which a root that is a URL is staged: one of its own below `staging`."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", root.rpartition("://")[2]).strip("-")
    return Path(resolve_staging(staging)) / f"{name[-40:]}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
