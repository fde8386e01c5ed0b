"""Which PEFT folders a command line names, and by which labels."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qlora_dist.errors import ModelError

ADAPTER_FILE, SUMMARY_FILE = "adapter_config.json", "summary.json"
CHOSEN_STAGES, TRAINED_STAGES = ("winner", "halved"), ("adapter", "worker")
"""The stages that leave a shard's adapter: of a swept run the one that was chosen, else the one that was trained."""


def find_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Returns the PEFT folders that the arguments name, by label: a run's own, else the folder's name.

    A label that two folders have is lengthened by their parents' names until it is one's alone.

    Raises:
        ModelError: if an argument names no PEFT folder, or one comes twice.
    """
    found = [labelled for argument in arguments for labelled in _folders_of(argument)]
    if twice := [str(path) for path, count in Counter(f.resolve() for _, f in found).items() if count > 1]:
        raise ModelError(f"{twice[0]} was given twice. Name each adapter once; --weights says how much it counts.")
    folders = dict(zip(_distinct(found), [path for _, path in found], strict=True))
    assert len(folders) == len(found), "two adapters share a label"
    return folders


def _distinct(found: Sequence[tuple[str, Path]]) -> list[str]:
    labels, depths = [label for label, _ in found], [1] * len(found)
    while shared := {label for label, count in Counter(labels).items() if count > 1}:
        for i in range(len(found)):
            if labels[i] in shared:
                depths[i] += 1
                labels[i] = "/".join(found[i][1].resolve().parts[-depths[i] :])
    return labels


def _folders_of(argument: str) -> list[tuple[str, Path]]:
    path = Path(argument).expanduser()
    if (path / ADAPTER_FILE).is_file():
        return [(path.name or path.resolve().name, path)]
    nodes = _nodes_of_run(path)
    if nodes is not None:
        found = _folders_of_run(nodes)
    else:
        pattern = f"{glob.escape(str(path))}/*" if path.is_dir() else str(path)
        matches = [Path(match) for match in sorted(glob.glob(pattern))]  # noqa: PTH207 - may be absolute
        found = [(match.name, match) for match in matches if (match / ADAPTER_FILE).is_file()]
    if not found:
        wanted = f"a PEFT folder (one that holds {ADAPTER_FILE}), a folder or glob of such, or a run's folder"
        raise ModelError(f"{argument}: holds no PEFT folder: expected {wanted}.")
    return found


def _nodes_of_run(run: Path) -> list[dict[str, str]] | None:
    """Returns what the summary of a run says of its nodes, None for a folder that is no run's."""
    try:
        nodes = json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))["nodes"]
        return [{"stage": n["stage"], "label": n["label"]} | n for n in nodes]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folders_of_run(nodes: Sequence[dict[str, str]]) -> list[tuple[str, Path]]:
    """Returns a run's adapters by the labels of their shards: of a sweep those that were chosen."""
    chosen = [n for n in nodes if n["stage"] in CHOSEN_STAGES]
    found = chosen or [n for n in nodes if n["stage"] in TRAINED_STAGES]
    return [(n["label"], Path(n["folder"])) for n in found if "folder" in n]
