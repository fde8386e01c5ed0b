"""Checkpoints: whole, by parameter name, in safetensors; they know no strategy and no number of ranks.

A checkpoint holds each lane's factors and Adam moments. Learning rate, row order and dropout masks are pure
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
    """A checkpoint that was read and found whole."""

    step: int
    tensors: dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one training, in a folder of its own; the newest `keep` are kept."""

    def __init__(self, folder: Path, recipe: dict[str, Any], keep: int = 2) -> None:
        self.folder, self._keep = folder, keep
        self.recipe = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> Path:
        """Writes the state after `step` steps aside, syncs it, and renames it into place."""
        from safetensors.torch import save_file

        path = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{path.name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside / TENSORS_FILE)
        state = {"step": step, "recipe": self.recipe, "sha256": _digest(aside / TENSORS_FILE)}
        (aside / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        for file in (aside / TENSORS_FILE, aside / STATE_FILE):
            _sync(file)
        shutil.rmtree(path, ignore_errors=True)
        aside.replace(path)
        _sync(self.folder)
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def latest(self) -> Checkpoint | None:
        """Returns the newest whole checkpoint of this recipe; one that is torn or foreign is named and passed over."""
        for path in reversed(self._steps()):
            try:
                return self._read(path)
            except _UnusableError as reason:
                log.warning("checkpoint %s is %s; using the one before it", path, reason)
        return None

    def remove(self) -> None:
        """Removes all checkpoints: the training is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _read(self, path: Path) -> Checkpoint:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            if state["recipe"] != self.recipe:
                raise _UnusableError("of another recipe")
            if state["sha256"] != _digest(path / TENSORS_FILE):
                raise _UnusableError("torn (its bytes are not those that were written)")
            return Checkpoint(int(state["step"]), load_file(path / TENSORS_FILE))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _UnusableError(f"torn ({error})") from error


class _UnusableError(Exception):
    """Why a checkpoint is passed over."""


def lane_state(lanes: list[Lane]) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint holds: `<lane>/<parameter>` and its Adam moments, as live tensors.

    Moments of a lane that took no step yet are made here, as zeros.
    """
    tensors: dict[str, torch.Tensor] = {}
    for lane in lanes:
        assert lane.optimizer is not None
        for name, parameter in lane.parameters.items():
            moments = lane.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.tensor(0.0)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            key = f"{lane.name}/{name}"
            tensors[key] = parameter.detach()
            tensors |= {f"{key}#{moment}": moments[moment] for moment in ("step", "exp_avg", "exp_avg_sq")}
    return tensors


def restore(lanes: list[Lane], tensors: dict[str, torch.Tensor]) -> None:
    """Copies a checkpoint's tensors into the lanes, all of them by name.

    Raises:
        TrainError: if it holds other tensors than the lanes, optimizer state included.
    """
    live = lane_state(lanes)
    if different := sorted(live.keys() ^ tensors.keys()):
        repair = "It is of another version: remove its folder to begin anew"
        raise TrainError(f"The checkpoint and the lanes differ in {len(different)} tensors ({different[0]}). {repair}.")
    for name, value in live.items():
        value.copy_(tensors[name])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
