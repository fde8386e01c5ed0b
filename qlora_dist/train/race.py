"""A race: all trials of one shard as lanes on one base, any of them trained as far as is asked.

Lanes that run are kept together, in one checkpoint that is written whole or not at all. So a life that was killed goes
on from a turn in which all of them stood, and takes the same steps to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qlora_dist.errors import Preempted
from qlora_dist.model.adapter import ADAPTER_FILES
from qlora_dist.runtime import Facts, JsonlSink, Progress, log, sinks
from qlora_dist.train.checkpoint import Checkpoints, lane_state, restore
from qlora_dist.train.course import METRICS_FILE, Course
from qlora_dist.train.engine import Engine
from qlora_dist.train.joint import Job, check_group, course_of, recipe_of
from qlora_dist.train.loop import Loop, keep_metrics, stop_on_signal
from qlora_dist.train.processes import joined
from qlora_dist.train.strategies.choice import choose_strategy
from qlora_dist.train.training import Training

STEPS = "@steps"
"""Stands in a checkpoint for the steps that a lane has taken."""


@dataclass(slots=True)
class Race:
    """The trials of one shard, by name, each where it stands; use it in a `with` block."""

    trainings: Mapping[str, Training]
    checkpoints: Checkpoints
    job: Job
    engine: Engine
    loop: Loop
    _stack: ExitStack = field(default_factory=ExitStack)
    _saved: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, trainings: Mapping[str, Training], folder: Path) -> Race:
        """Loads the base, puts a lane on it for each trial, checks them, and goes on from the newest checkpoint.

        Raises:
            TrainError: if the base or the rows don't fit.
            ConfigError: if the trials can't share a forward pass.
        """
        check_group({name: training.config for name, training in trainings.items()})
        recipes = {name: recipe_of(training) for name, training in trainings.items()}
        first = next(iter(trainings.values()))
        courses = {name: course_of(name, t, recipes[name], name) for name, t in trainings.items()}
        stack = ExitStack()
        stack.enter_context(joined(1, first.config.strategy.timeout_s))
        lanes = [course.lane for course in courses.values()]
        engine = Engine.build(first.config.model, first.base, lanes, choose_strategy(first.config, first.base))
        engine.examine(list(courses.values()))
        for name, course in courses.items():
            stack.enter_context(sinks(JsonlSink(course.folder / METRICS_FILE), lane=name))
        train = first.config.train
        loop = Loop(engine.stepper, list(courses.values()), train.checkpoint_every_s, train.log_every_steps)
        job = Job(group="", courses=courses, trainings=dict(trainings), engine=engine)
        race = cls(trainings, Checkpoints(folder, recipes), job, engine, loop, stack)
        race._resume()
        return race

    def __enter__(self) -> Race:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def steps_of(self, trial: str) -> int:
        """Returns how many steps a trial has taken."""
        return self.job.courses[trial].step

    def error_of(self, trial: str) -> str:
        """Returns why a trial is lost, "" if it isn't."""
        error = self.job.courses[trial].error
        return str(error) if error is not None else ""

    def train_to(self, targets: Mapping[str, int]) -> None:
        """Takes steps of these trials, one of each a turn, until each stands at its own target or is lost.

        Raises:
            Preempted: after SIGTERM or SIGUSR2, once the turn is finished and kept.
        """
        courses = {k: c for k, c in enumerate(self.job.courses.values()) if c.lane.name in targets}

        def running() -> dict[int, Course]:
            return {k: c for k, c in courses.items() if c.error is None and c.step < targets[c.lane.name]}

        left = max((targets[c.lane.name] - c.step for c in running().values()), default=0)
        progress, taken = Progress(self.loop.turn + left, unit="turn"), False
        with stop_on_signal(self.engine.stepper):
            while now := running():
                self.loop.take_turn(now, progress)
                taken = True
                wants_stop = self.engine.stepper.wants_stop
                if wants_stop or time.monotonic() - self._saved >= self.loop.checkpoint_every_s:
                    self._keep(courses.values())
                if wants_stop:
                    raise Preempted(f"Stopped on request after turn {self.loop.turn}. Run the same command again.")
        if taken:
            self._keep(courses.values())

    def state(self, trial: str) -> dict[str, torch.Tensor]:
        """Returns a trial's factors and Adam moments as they are now, each without gaps, as a file wants them."""
        state = lane_state(self.job.courses[trial].lane)
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()
        }

    def load(self, trial: str, steps: int, tensors: dict[str, torch.Tensor], metrics: Path) -> None:
        """Puts a trial where it stood after `steps` steps, with the metrics it had by then."""
        course = self.job.courses[trial]
        restore(course.lane, tensors)
        course.step = course.first_step = steps
        if metrics.exists():
            course.metrics.write_bytes(metrics.read_bytes())

    def load_adapter(self, trial: str, folder: Path) -> None:
        """Gives a trial the factors of its finished adapter, trained elsewhere: to be measured, not to be trained."""
        from safetensors.torch import load_file

        course, saved = self.job.courses[trial], load_file(folder / ADAPTER_FILES[1])
        for name, value in course.lane.state().items():
            value.copy_(saved[name])
        course.step = course.lane.budget.num_steps

    @contextmanager
    def seated(self, trial: str = "") -> Iterator[Any]:
        """Yields the causal language model with one trial's adapter on it, or the base alone, for measuring."""
        stepper = self.engine.stepper
        names = list(self.job.courses)
        stepper.seating.rows = {names.index(trial): slice(None)} if trial else {}
        stepper.model.eval()
        try:
            yield stepper.model.model
        finally:
            stepper.model.train()

    def finish(self, trial: str) -> Facts:
        """Checks and saves a trial that has taken its last step; its folder then is an adapter's.

        Raises:
            TrainError: if a check of the certificate fails.
        """
        self.engine.check_unchanged()
        return self.job.finish(trial, self.job.courses[trial])

    def _keep(self, courses: Any) -> None:
        """Writes the running lanes into one checkpoint."""
        tensors: dict[str, torch.Tensor] = {}
        for course in courses:
            if course.error is None:
                tensors |= {f"{course.lane.name}/{name}": v for name, v in lane_state(course.lane).items()}
                tensors[f"{course.lane.name}/{STEPS}"] = torch.tensor(course.step)
        if tensors:
            self.checkpoints.save(self.loop.turn, tensors, turn=self.loop.turn)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        found = next(iter(self.checkpoints.usable()), None)
        held: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in found.tensors().items() if found else ():
            trial, _, own = name.partition("/")
            held.setdefault(trial, {})[own] = value
        for trial, tensors in held.items():
            course = self.job.courses[trial]
            course.step = course.first_step = int(tensors.pop(STEPS))
            restore(course.lane, tensors)
        for course in self.job.courses.values():
            keep_metrics(course.metrics, course.step)
        if found is not None:
            self.loop.turn = found.turn
            log.info("continuing after turn %d with %s", found.turn, ", ".join(held))
