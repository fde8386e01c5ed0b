"""Prints an artifact's ancestry as a tree: `python -m qlora_dist.artifacts.show FOLDER`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from qlora_dist.artifacts.fingerprint import KEY_LENGTH
from qlora_dist.artifacts.store import MANIFEST, Manifest, Store
from qlora_dist.errors import ArtifactError, QloraDistError

SUMMARY, SHIPPED = "summary.json", ("merged", "chosen")
"""The file that closes a run, and the stages of which one makes what it ships."""
_NAME_ONE = "Name a run's folder, or one below runs/artifacts/<stage>/."
SHOWN_FACTS = (
    "num_records",
    "num_rows",
    "tokens",
    "num_steps",
    "validation_loss",
    "method",
    "weights",
    "parts",
    "chosen",
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.artifacts.show", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run, or an artifact: runs/artifacts/<stage>/<label>-<key>")
    parser.add_argument("--verify", action="store_true", help="compare every byte of the ancestry with its digests")
    args = parser.parse_args(argv)
    try:
        Console().print(ancestry(args.folder, verify=args.verify))
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def ancestry(folder: Path, *, verify: bool = False) -> Tree:
    """Returns an artifact with all that it was made from; one that appears again is not unfolded again.

    A run's folder, or `adapter/` in it, stands for what the run ships.

    Raises:
        ArtifactError: if the folder is no artifact, or one of its ancestors is damaged.
    """
    folder = _shipped_by(folder).resolve()
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} is no finished artifact: it has no {MANIFEST}. {_NAME_ONE}")
    artifact_id = f"{folder.parent.name}/{folder.name}"
    _refuse_foreign(folder, artifact_id)
    store = Store(folder.parents[1])
    tree = Tree("")
    _grow(tree, store, artifact_id, seen=set(), verify=verify)
    return tree.children[0]


def _refuse_foreign(folder: Path, artifact_id: str) -> None:
    """Refuses a folder that isn't where a store keeps an artifact, whatever its manifest: it may be anybody's.

    Raises:
        ArtifactError: saying what it is not.
    """
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = "{stage}/{label}-{key}".format_map(told)
    except (OSError, ValueError, TypeError, KeyError):
        if not re.fullmatch(rf".+-[0-9a-f]{{{KEY_LENGTH}}}", folder.name):
            raise ArtifactError(f"{folder} is no artifact: its {MANIFEST} is another program's. {_NAME_ONE}") from None
        return
    if found != artifact_id:
        raise ArtifactError(f"{folder} is in no store: its {MANIFEST} is of {found}. {_NAME_ONE}")


def _shipped_by(folder: Path) -> Path:
    """Returns the artifact that a run ships, for a run's folder or its `adapter/`; any other folder as it is."""
    run = folder.resolve().parent if folder.name == "adapter" else folder
    if (folder / MANIFEST).is_file() or not (run / SUMMARY).is_file():
        return folder
    try:
        nodes = json.loads((run / SUMMARY).read_text(encoding="utf-8"))["nodes"]
        return next((Path(n["folder"]) for n in nodes if n["stage"] in SHIPPED and "folder" in n), folder)
    except (OSError, ValueError, TypeError, KeyError):  # torn, or another program's
        return folder


def _grow(parent: Tree, store: Store, artifact_id: str, *, seen: set[str], verify: bool) -> None:
    if artifact_id in seen:
        parent.add(f"[dim]{artifact_id} (above)[/dim]")
        return
    seen.add(artifact_id)
    if not store.is_finished(artifact_id):
        parent.add(f"[yellow]{artifact_id} (deleted)[/yellow]")
        return
    if verify:
        store.verify(artifact_id)
    manifest = store.manifest(artifact_id)
    branch = parent.add(_describe(manifest))
    for name, leaf in manifest.leaves.items():
        branch.add(f"[dim]{escape(f'{name}: {leaf[:12]}')}[/dim]")
    for parent_id in manifest.inputs.values():
        _grow(branch, store, parent_id, seen=seen, verify=verify)


def _describe(manifest: Manifest) -> str:
    size = sum(entry["bytes"] for entry in manifest.files.values())
    told = manifest.facts | _shares(manifest.facts)
    facts = ", ".join(f"{name} {_short(told[name])}" for name in SHOWN_FACTS if name in told)
    made = f"{manifest.made.get('time', '')} in {manifest.seconds:g} s, {size / 1e6:.1f} MB"
    return f"[bold]{escape(manifest.id)}[/bold] {escape(facts)} [dim]{escape(made)}[/dim]"


def _shares(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parts of a merge with what each counted."""
    parts = [part for part in facts.get("parts", []) if "weight" in part]
    return {"parts": {part["label"]: part["weight"] for part in parts}} if parts else {}


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
