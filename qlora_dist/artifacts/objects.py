"""Files at a URL: the few things that are asked of fsspec, for `s3://`, `gs://`, `memory://` and what else it knows."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_dist.errors import ArtifactError, ConfigError

NUM_THREADS = 8
"""How many files travel at once."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""The extra of this package that brings a protocol's library."""


def is_url(root: str) -> bool:
    """Says that a root is a URL rather than a folder of this machine."""
    return "://" in root and not root.startswith("file://")


def read_text(address: str) -> str:
    """Reads a text file by its path or its URL.

    Raises:
        OSError: if it isn't there.
    """
    if not is_url(address):
        return Path(address).read_text(encoding="utf-8")
    folder, _, name = address.rpartition("/")
    found = Objects(folder).read(name)
    if found is None:
        raise FileNotFoundError(f"{address} is not there")
    return found.decode()


class Objects:
    """The files below one URL, by their path below it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._top = _open(self.url)

    def path(self, name: str) -> str:
        """Returns a file's path as fsspec takes it."""
        return f"{self._top}/{name}" if name else self._top

    def exists(self, name: str) -> bool:
        """Says whether a file is there now."""
        return bool(self._files.isfile(self.path(name)))

    def read(self, name: str) -> bytes | None:
        """Returns a file's bytes, None if it isn't there."""
        try:
            found: bytes = self._files.cat_file(self.path(name))
        except FileNotFoundError:
            return None
        return found

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns a JSON object, None if it isn't there or is none."""
        try:
            found = json.loads(self.read(name) or b"null")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def write(self, name: str, value: bytes) -> None:
        """Writes a small file, in place of the one that may be there: readers see the one or the other, never half."""
        self._files.pipe_file(self.path(name), value)

    def create(self, name: str, value: bytes) -> bool:
        """Writes a small file unless it is there; of several who try at once one is told True.

        That is the store's own promise (S3: `If-None-Match`, Google: `if-generation-match`). Where a store knows no
        such condition, looking and writing are two steps, and two who do both within them are both told True.
        """
        if self.exists(name):
            return False
        try:
            self._files.pipe_file(self.path(name), value, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError):
            self.write(name, value)
        except OSError as error:
            if "PreconditionFailed" not in f"{type(error).__name__} {error}" and "412" not in str(error):
                raise
            return False
        return True

    def modified(self, name: str) -> float:
        """Returns when a file was last written, in seconds on the store's own clock; 0 if it isn't there."""
        try:
            return float(self._files.modified(self.path(name)).timestamp())
        except FileNotFoundError:
            return 0.0

    def names(self, folder: str) -> list[str]:
        """Returns the names directly below a folder, none if it isn't there."""
        try:
            found = self._files.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def walk(self, folder: str) -> dict[str, int]:
        """Returns the size of every file below a folder, by its path below that folder."""
        top = self.path(folder).rstrip("/") + "/"
        try:
            found = self._files.find(top, detail=True)
        except FileNotFoundError:
            return {}
        start = top.lstrip("/")
        return {str(path).lstrip("/").removeprefix(start): int(info["size"]) for path, info in found.items()}

    def remove(self, names: Iterable[str]) -> None:
        """Removes files; one that isn't there is no error."""
        for name in names:
            try:
                self._files.rm_file(self.path(name))
            except FileNotFoundError:
                continue

    def upload(self, folder: Path, names: Iterable[str], to: str) -> None:
        """Copies files of a folder of this machine to a folder here."""
        _each(lambda name: self._files.put_file(str(folder / name), self.path(f"{to}/{name}")), names)

    def download(self, at: str, names: Iterable[str], folder: Path) -> None:
        """Copies files of a folder here to a folder of this machine."""

        def fetch(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(self.path(f"{at}/{name}"), str(folder / name))

        _each(fetch, names)


def _each(act: Any, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in pool.map(act, names):
            pass


def _open(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL and the path there.

    Raises:
        ConfigError: if nobody knows the protocol, or its library isn't installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        files, top = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        repair = f"pip install 'qlora_dist[{extra}]'" if extra else f"Install what it needs ({error})"
        raise ConfigError(f"root={url}: {protocol}:// needs a library that isn't installed. {repair}.") from error
    except ValueError as error:
        known = ", ".join(sorted(p for p in fsspec.available_protocols() if p in {"s3", "gs", "abfs", "memory", "hf"}))
        raise ConfigError(f"root={url}: {protocol}:// is not known. Known: a folder, {known}.") from error
    return files, str(top).rstrip("/")


def unreachable(url: str, error: Exception) -> ArtifactError:
    """Says that a URL can't be read or written, and what to look at."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    repair = "Check the bucket's name and your credentials (S3: AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)."
    return ArtifactError(f"root={url}: it can't be read or written ({reason}). {repair}")


def require_writable(url: str) -> None:
    """Writes a small file below a URL and removes it.

    Raises:
        ArtifactError: if that can't be done, with what the store said.
    """
    objects, probe = Objects(url), f".probe-{uuid.uuid4().hex}"
    try:
        objects.write(probe, b"")
        objects.remove([probe])
    except Exception as error:  # each store's library has its own
        raise unreachable(url, error) from error
