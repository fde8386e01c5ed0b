"""The one loop: K lanes over one frozen base, on one process or many, stopped and continued at any step."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import Preempted
from qlora_dist.runtime import Progress, log, log_metrics
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.checkpoint import Checkpoints, lane_state, restore
from qlora_dist.train.checks import Watch
from qlora_dist.train.huggingface import check_finite
from qlora_dist.train.memory import peak_memory_bytes
from qlora_dist.train.processes import naming_who_is_missing
from qlora_dist.train.step import Stepper, StepResult

Between = Callable[[int, bool], int | None]
"""Is called on every rank with the number of steps taken, before a life's first step (then with True) and after each
one. It may replace the factors; if it does, it returns how many steps count as taken, else None."""


@dataclass(slots=True)
class Loop:
    """Trains all lanes to the end of their budgets, or to a request to stop.

    Raises:
        TrainError: if a loss or gradient isn't finite, or a check of the certificate fails.
        Preempted: after SIGTERM or SIGUSR2, once the step is finished and its checkpoint written.
    """

    stepper: Stepper
    checkpoints: Checkpoints
    certificate: Certificate
    checkpoint_every_s: float
    log_every_steps: int = 1
    between: Between | None = None
    _started: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    def run(self, metrics: Path) -> int:
        """Trains, and returns the number of the step (0-based) that this life began with."""
        start = self._resume(metrics)
        last = max(lane.budget.num_steps for lane in self.stepper.lanes)
        progress = Progress(last)
        progress.update(start)
        self._started = self._saved = time.monotonic()
        with stop_on_signal(self.stepper):
            step = start = self._meet(start, last, is_first=True)
            while step < last:
                watch = Watch(self.stepper, step, is_first=step == start) if step < start + 2 else None
                with naming_who_is_missing(step):
                    results = self.stepper.take(step)
                if watch is not None:
                    watch.check(self.certificate)
                self._tell(step + 1, start, last, results, progress)
                self._keep(step + 1, last)
                step = self._meet(step + 1, last)
        return start

    def _resume(self, metrics: Path) -> int:
        """Continues from the newest whole checkpoint, the same on every rank; returns the next step."""
        strategy, lanes = self.stepper.strategy, self.stepper.lanes
        found = self.checkpoints.latest() if strategy.rank == 0 else None
        live = lane_state(lanes)
        if found is not None:
            restore(lanes, found.tensors)
        step = torch.tensor([found.step if found else 0], device=strategy.device)
        strategy.broadcast([step, *live.values()])
        if found is not None:
            log.info("continuing after step %d", found.step)
        if strategy.rank == 0:
            keep_metrics(metrics, int(step))
        return int(step)

    def _tell(self, step: int, start: int, last: int, results: dict[str, StepResult], progress: Progress) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        tokens = sum(lane.train.tokens_per_step for lane in self.stepper.lanes if lane.name in results)
        values: dict[str, float] = {}
        for name, result in results.items():
            prefix = f"{name}/" if len(self.stepper.lanes) > 1 else ""
            values |= {f"{prefix}{key}": getattr(result, key) for key in ("loss", "learning_rate", "grad_norm")}
            check_finite(step, {"loss": result.loss, "grad_norm": result.grad_norm})
        values["tokens_per_s"] = (step - start) * tokens / elapsed
        progress.update(step, **values)
        if step % self.log_every_steps == 0 or step == last:
            log_metrics(step, values | {"memory_bytes": peak_memory_bytes()})

    def _meet(self, step: int, last: int, is_first: bool = False) -> int:
        """Lets `between` replace the factors; returns how many steps count as taken, with a checkpoint of that."""
        if self.between is None:
            return step
        found = self.between(step, is_first)
        if found is not None or self.stepper.wants_stop:
            step = step if found is None else found
            self._keep(step, last, is_due=True)
        return step

    def _keep(self, step: int, last: int, is_due: bool = False) -> None:
        """Writes a checkpoint when it is time, and stops when any rank was asked to."""
        stop = self.stepper.wants_stop
        due = is_due or time.monotonic() - self._saved >= self.checkpoint_every_s
        if (due or stop) and step < last:
            if self.stepper.strategy.rank == 0:
                self.checkpoints.save(step, lane_state(self.stepper.lanes))
            self._saved = time.monotonic()
        if stop and step < last:
            raise Preempted(f"Stopped on request after step {step} of {last}. Run the same command to continue.")


@contextmanager
def stop_on_signal(stepper: Stepper) -> Iterator[None]:
    """Turns SIGTERM and SIGUSR2 into the wish to stop after the running step."""

    def wish(*_: Any) -> None:
        stepper.wants_stop = True

    before = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_metrics(path: Path, steps: int) -> None:
    """Drops the lines of steps that will be taken again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
