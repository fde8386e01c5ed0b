"""Digests of folders that are no artifacts (a base model on disk), remembered by size and time of change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qlora_dist.artifacts.fingerprint import canonical, file_digest
from qlora_dist.runtime import write_json

CACHE = "digests.json"


def folder_digest(folder: Path, cache: Path) -> str:
    """Returns one digest of the names and bytes of all files of a folder, hidden ones left out.

    A file is read once: `cache`, a folder, keeps its digest for as long as its size and time of change stay.
    """
    cached = _read(cache / CACHE)
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        stat = path.stat()
        known = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if known not in cached:
            cached[known] = file_digest(path)
        digests[path.relative_to(folder).as_posix()] = cached[known]
    cache.mkdir(parents=True, exist_ok=True)
    write_json(cache / CACHE, cached)
    return hashlib.sha256(canonical(digests).encode()).hexdigest()


def _read(path: Path) -> dict[str, str]:
    try:
        values: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
