"""Names: the key of a recipe, known before anything is made, and the digest of bytes, known after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY_LENGTH = 12


def canonical(value: Any) -> str:
    """Renders plain JSON values in the one form that equal values share."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def recipe_key(
    stage: str,
    version: int,
    recipe: Any,
    inputs: Mapping[str, str] | None = None,
    leaves: Mapping[str, str] | None = None,
) -> str:
    """Returns the key of what a stage makes from a recipe: equal recipes, and only they, share it.

    Args:
        stage: the stage's name.
        version: raised by hand when the stage makes other bytes of the same recipe.
        recipe: the identity part of the stage's config.
        inputs: key of each input artifact, by its name.
        leaves: content digest of each input that is no artifact (source files, a base folder).
    """
    parts = {"stage": stage, "version": version, "recipe": recipe, "inputs": inputs or {}, "leaves": leaves or {}}
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:KEY_LENGTH]


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ABSENT = object()


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """Lists the leaves in which two recipes differ, each as `key: before -> after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(before.keys() | after.keys())
        pairs = ((f"{key}.{n}" if key else n, before.get(n, ABSENT), after.get(n, ABSENT)) for n in names)
        return [line for name, b, a in pairs for line in differences(b, a, name)]
    return [] if before == after else [f"{key}: {_short(before)} -> {_short(after)}"]


def _short(value: Any) -> str:
    if value is ABSENT:
        return "(absent)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
