"""Checkpoints: whole, by parameter name, in safetensors; they know no strategy, no number of ranks and no neighbours.

A checkpoint holds one lane's factors and Adam moments. Learning rate, row order and dropout masks are pure
functions of the recipe and the step, so the step number is all there is to keep of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import TrainError
from qlora_dist.runtime import log
from qlora_dist.train.lanes import Lane

STATE_FILE, TENSORS_FILE = "state.json", "state.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole: after how many of its lane's steps, in which turn of which group of lanes.

    `rows` stands for the rows of the lane's next step, as they were to be.
    """

    path: Path
    step: int
    turn: int
    group: str
    rows: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Reads what was saved."""
        from safetensors.torch import load_file

        return load_file(self.path / TENSORS_FILE)


class Checkpoints:
    """The checkpoints of one lane, in a folder of its own; the newest `keep` are kept."""

    def __init__(self, folder: Path, recipe: dict[str, Any], keep: int = 2) -> None:
        self.folder, self._keep = folder, keep
        self.recipe = recipe_digest(recipe)

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], *, turn: int = 0, group: str = "", rows: int = 0
    ) -> Path:
        """Writes the state after `step` steps aside, syncs it, and renames it into place."""
        from safetensors.torch import save_file

        path = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{path.name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside / TENSORS_FILE)
        state = {"step": step, "turn": turn, "group": group, "rows": rows, "recipe": self.recipe}
        state["sha256"] = file_digest(aside / TENSORS_FILE)
        (aside / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        for file in (aside / TENSORS_FILE, aside / STATE_FILE):
            _sync(file)
        before = self.folder / f".{path.name}.before"
        if path.exists():
            path.replace(before)
        aside.replace(path)
        _sync(self.folder)
        shutil.rmtree(before, ignore_errors=True)
        self._forget(path)
        return path

    def _forget(self, newest: Path) -> None:
        """Removes what `newest` makes useless: older checkpoints beyond `keep`, and later ones that no life used.

        Checkpoints of another recipe are neither counted nor touched.
        """
        own = [path for path in self._steps() if self._is_own(path)]
        place = own.index(newest)
        for path in own[: max(0, place + 1 - self._keep)] + own[place + 1 :]:
            shutil.rmtree(path, ignore_errors=True)

    def usable(self) -> list[Checkpoint]:
        """Returns this recipe's whole checkpoints, newest first; torn and foreign ones are named and passed over."""
        found = []
        for path in reversed(self._steps()):
            try:
                found.append(self._read(path))
            except _UnusableError as reason:
                log.warning("checkpoint %s is %s; using the one before it", path, reason)
        return found

    def remove(self) -> None:
        """Removes all checkpoints: the training is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _is_own(self, path: Path) -> bool:
        try:
            return bool(json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["recipe"] == self.recipe)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self, path: Path) -> Checkpoint:
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            if state["recipe"] != self.recipe:
                raise _UnusableError("of another recipe")
            if state["sha256"] != file_digest(path / TENSORS_FILE):
                raise _UnusableError("torn (its bytes are not those that were written)")
            return Checkpoint(path, int(state["step"]), int(state["turn"]), str(state["group"]), int(state["rows"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _UnusableError(f"torn ({error})") from error


class _UnusableError(Exception):
    """Why a checkpoint is passed over."""


def lane_state(lane: Lane) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint holds: each factor, its Adam moments (`<name>#<moment>`), and `#step`, as live tensors.

    Moments of a lane that took no step yet are made here, as zeros.
    """
    return {name: parameter.detach() for name, parameter in lane.parameters.items()} | lane.optimizer_state()


def restore(lane: Lane, tensors: dict[str, torch.Tensor]) -> None:
    """Copies a checkpoint's tensors into the lane, all of them by name.

    Raises:
        TrainError: if it holds other tensors than the lane, optimizer state included.
    """
    live = lane_state(lane)
    if different := sorted(live.keys() ^ tensors.keys()):
        repair = "It is of another version: remove its folder to begin anew"
        raise TrainError(f"The checkpoint and the lane differ in {len(different)} tensors ({different[0]}). {repair}.")
    for name, value in live.items():
        value.copy_(tensors[name])


def recipe_digest(recipe: dict[str, Any]) -> str:
    """Returns the digest by which what belongs to one recipe is known."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
