"""A training that meets others of its kind: after some steps it hands in its factors, and goes on from the average.

What is handed in and brought back are PEFT folders, so that a meeting may be anywhere; `pipeline.rounds` has it in a
folder on shared storage. The optimizer's state stays with the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from qlora_dist.errors import TrainError
from qlora_dist.model.adapter import ADAPTER_FILES, write_provenance
from qlora_dist.train.adapter_file import save_lane
from qlora_dist.train.lanes import Lane
from qlora_dist.train.step import Stepper
from qlora_dist.train.training import Training, provenance

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """The adapter to go on from, and the number of steps that count as taken."""

    folder: Path
    step: int


class Meeting(Protocol):
    """What a training asks of the place where it meets others; all but `is_due` on rank 0 alone."""

    def is_due(self, step: int) -> bool:
        """Says whether the workers meet after `step` steps."""

    def hand_in(self, step: int, write: Callable[[Path], None]) -> None:
        """Takes what this worker made in the round that ends after `step` steps; `write` fills an empty folder."""

    def ask(self, step: int) -> Answer | None:
        """Returns what to go on from after the meeting at `step`, None while others are waited for."""

    def catch_up(self, step: int) -> Answer | None:
        """Returns what a new life, `step` steps in, goes on from if the others went on without it."""

    def makes_room(self) -> bool:
        """Says whether this worker should stop, to be run again later: those it waits for have no place to run."""


@dataclass(slots=True)
class Exchange:
    """Takes a lane's factors to a meeting, and brings back those to go on from, the same on every rank."""

    meeting: Meeting
    training: Training
    stepper: Stepper
    lane: Lane

    def __call__(self, step: int, is_first: bool) -> int | None:
        """Meets, if it is time; returns how many steps count as taken if the factors were replaced.

        On a request to stop while it waits it returns None, with the stepper's `wants_stop` set on every rank.
        """
        if self.meeting.is_due(step):
            return self._meet(step)
        return self._adopt(self.meeting.catch_up(step) if self._leads else None) if is_first else None

    @property
    def _leads(self) -> bool:
        return self.stepper.strategy.rank == 0

    def _meet(self, step: int) -> int | None:
        if self._leads:
            self.meeting.hand_in(step, self._write)
        while True:
            found = self._adopt(self.meeting.ask(step) if self._leads else None)
            if found is not None or self._all_stop():
                return found
            time.sleep(POLL_S)

    def _all_stop(self) -> bool:
        """Says whether a rank was asked to stop, or rank 0 makes room; every rank then knows."""
        strategy = self.stepper.strategy
        wish = torch.tensor([float(self.stepper.asked_to_stop or (self._leads and self.meeting.makes_room()))])
        wish = wish.to(strategy.device)
        strategy.sum_over_ranks([wish])
        self.stepper.wants_stop = bool(wish.item() > 0)
        return self.stepper.wants_stop

    def _write(self, folder: Path) -> None:
        save_lane(self.lane, folder, self.training.base)
        write_provenance(folder, provenance(self.training, None))

    def _adopt(self, answer: Answer | None) -> int | None:
        """Puts the answer's factors into the lane of every rank."""
        strategy, live = self.stepper.strategy, self.lane.state()
        step = torch.tensor([answer.step if answer else -1], device=strategy.device)
        strategy.broadcast([step])
        if int(step) < 0:
            return None
        if answer is not None:
            copy_factors(answer.folder, live)
        strategy.broadcast(list(live.values()))
        return int(step)


def copy_factors(folder: Path, live: dict[str, torch.Tensor]) -> None:
    """Copies an adapter's factors into live tensors, by name.

    Raises:
        TrainError: if the folder holds other tensors.
    """
    from safetensors.torch import load_file

    found = load_file(folder / ADAPTER_FILES[1])
    if different := sorted(found.keys() ^ live.keys()):
        repair = "All workers need the same base and the same lora group"
        raise TrainError(f"{folder}: is no adapter of this training ({different[0]} is in one alone). {repair}.")
    for name, value in live.items():
        value.copy_(found[name])
