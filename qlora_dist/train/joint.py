"""Several adapters trained at once over one frozen base: one job, one loaded model, a folder for each adapter."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import Method
from qlora_dist.errors import QloraDistError, TrainError, bad_value
from qlora_dist.model.adapter import write_provenance
from qlora_dist.model.base import Base
from qlora_dist.model.lora import attach_lora
from qlora_dist.runtime import Facts, JsonlSink, quiet_libraries, rank, sinks
from qlora_dist.train.adapter_file import check_saved, save_lane
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.checkpoint import recipe_digest
from qlora_dist.train.course import CHECKPOINTS, ENDED_FILE, METRICS_FILE, Course, End, read_end, write_end
from qlora_dist.train.engine import Engine
from qlora_dist.train.lanes import Lane
from qlora_dist.train.loop import Between, Loop
from qlora_dist.train.meeting import Exchange, Meeting
from qlora_dist.train.processes import joined, same_on_all_ranks
from qlora_dist.train.strategies.choice import choose_strategy
from qlora_dist.train.training import Training, provenance, training_facts


def train_adapters(
    configs: Mapping[str, AdapterConfig], inputs: Mapping[str, Mapping[str, Path]], outs: Mapping[str, Path]
) -> dict[str, Facts | QloraDistError]:
    """Trains the adapters of one group at once, as lanes over one frozen base, and leaves each in its own folder.

    The joint function of stage `adapter`. All of a group share base, model config, strategy and row length; rows,
    held-out rows, LoRA shape, recipe, budget and seed are each lane's own. With several processes it runs on each,
    and rank 0 alone writes. `strategy=single` with more than one label is the loop in one process.

    Each folder holds its own `metrics.jsonl` (logged too to the sinks that were opened for its label), its own
    `checkpoints/`, and in the end a PEFT folder like that of `train_adapter`. A checkpoint knows no neighbours: a
    node that was stopped in a group continues alone, or in another group, and the other way about. Killed at any
    moment and run again, lanes that had ended are not trained again, and the others go on from a turn that they
    have in common: the same bytes, in the same layout.

    Args:
        configs: what each adapter is, by label.
        inputs: what each reads, by label: `base`, `tokenizer`, `rows`, and `validation` where there is one.
        outs: where the files of each go.

    Returns:
        By label the facts of each, or the error that ended that one alone (a loss that is no number, rows that don't
        fit); the others are whole.

    Raises:
        TrainError: if the base, the strategy or a process fails, which ends all.
        ConfigError: if the configs can't share a base.
        Preempted: after SIGTERM or SIGUSR2, once every running lane has a checkpoint.
    """
    quiet_libraries()
    made: dict[str, Facts | QloraDistError] = {}
    trainings: dict[str, Training] = {}
    for label, config in configs.items():
        try:
            trainings[label] = Training.open(config, inputs[label], outs[label])
        except QloraDistError as error:
            made[label] = error
    check_group({label: configs[label] for label in trainings})
    if trainings:
        made |= train_lanes(trainings)
    return {label: made[label] for label in configs}


def check_group(configs: Mapping[str, AdapterConfig]) -> None:
    """Refuses to train adapters together that can't share a forward pass.

    Raises:
        ConfigError: naming the key in which two of them differ.
    """
    first = next(iter(configs.values()), None)
    for config in configs.values():
        assert first is not None
        if config.train.method is Method.full:
            raise bad_value("train.method", "full", "lora for adapters that train on one base at once")
        for key, mine, theirs in (
            ("model", config.model, first.model),
            ("strategy", config.strategy, first.strategy),
            ("train.row_tokens", config.train.row_tokens, first.train.row_tokens),
        ):
            if mine != theirs:
                raise bad_value(key, mine, f"one value for all adapters that train at once (another has {theirs})")


def train_lanes(
    trainings: Mapping[str, Training], *, solo: bool = False, meeting: Meeting | None = None
) -> dict[str, Facts | QloraDistError]:
    """Trains one lane for each training; `solo` logs its metrics under no name, and may meet others of its kind."""
    recipes = {label: recipe_of(training) for label, training in trainings.items()}
    config = next(iter(trainings.values())).config
    with joined(config.strategy.world_size, config.strategy.timeout_s):
        ends = same_on_all_ranks({label: read_end(t.out, recipes[label]) for label, t in trainings.items()})
        job = Job(group=recipe_digest(recipes), meeting=meeting)
        for label, training in trainings.items():
            if ends[label] is None:
                job.courses[label] = course_of(label, training, recipes[label], "" if solo else label)
                job.trainings[label] = training
        if job.courses:
            job.run()
        made = {label: _outcome(end) for label, end in ends.items() if end is not None} | job.made
        if rank() == 0:
            for label, training in trainings.items():
                _tidy(training.out, made[label])
    return made


def _tidy(folder: Path, made: Facts | QloraDistError) -> None:
    """Leaves a finished folder without checkpoints, and lets a lane that failed be tried again by another job."""
    if isinstance(made, QloraDistError):
        (folder / ENDED_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _outcome(end: End) -> Facts | QloraDistError:
    return end.facts if end.facts is not None else TrainError(end.error)


def recipe_of(training: Training) -> dict[str, Any]:
    """Returns what a checkpoint must share with the training that continues it: all but how and where it runs."""
    rows = training.rows
    shape = [rows.num_rows, rows.row_tokens, int(rows.trained_BT.sum())]
    return {"config": training.identity, "base": training.base.digest, "rows": shape}


def course_of(label: str, training: Training, recipe: dict[str, Any], told_as: str) -> Course:
    """Returns the way of a training's lane, at its beginning."""
    config = training.config
    lane = Lane(label, config.lora, config.train, config.seed, training.rows, training.budget)
    return Course(lane, training.out, recipe, config, training.held_out, told_as, certificate=Certificate(told_as))


def misfits(base: Base, courses: Mapping[str, Course]) -> dict[str, QloraDistError]:
    """Returns which lanes ask for layers that the base has not, and the error of each; loads no weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder(), local_files_only=True))
    found: dict[str, QloraDistError] = {}
    for label, course in courses.items():
        try:
            attach_lora(model, course.lane.lora).unload()
        except QloraDistError as error:
            found[label] = error
    return found


@dataclass(slots=True)
class Job:
    """The lanes of one process group on one base, from the first check to the last file."""

    group: str
    meeting: Meeting | None = None
    courses: dict[str, Course] = field(default_factory=dict)
    trainings: dict[str, Training] = field(default_factory=dict)
    made: dict[str, Facts | QloraDistError] = field(default_factory=dict)
    engine: Engine | None = None
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Trains all lanes; `made` says what came of each."""
        train = next(iter(self.trainings.values())).config.train
        self.engine = engine = self._build()
        if engine is None:
            return
        courses = list(self.courses.values())
        engine.examine(courses)
        with ExitStack() as stack:
            for course in courses:
                stack.enter_context(sinks(JsonlSink(course.folder / METRICS_FILE), lane=course.told_as))
            every_s, log_every = train.checkpoint_every_s, train.log_every_steps
            Loop(engine.stepper, courses, every_s, log_every, self.end, self._between(), self.group).run()

    def _build(self) -> Engine | None:
        """Builds the engine without the lanes that don't fit the base, which fail alone; None if no lane does."""
        first = next(iter(self.trainings.values()))
        model, strategy = first.config.model, choose_strategy(first.config, first.base)
        try:
            return Engine.build(model, first.base, [c.lane for c in self.courses.values()], strategy)
        except QloraDistError:
            failed = misfits(first.base, self.courses) if len(self.courses) > 1 else {}
            if not failed:
                raise
        for label, error in failed.items():
            self.courses.pop(label).fail(error)
            self.made[label] = error
        lanes = [course.lane for course in self.courses.values()]
        return Engine.build(model, first.base, lanes, strategy) if lanes else None

    def _between(self) -> Between | None:
        """Returns the meeting, where there is one, in the loop's words."""
        if self.meeting is None:
            return None
        assert self.engine is not None
        ((label, training),) = self.trainings.items()
        exchange = Exchange(self.meeting, training, self.engine.stepper, self.courses[label].lane)

        def meet(courses: Sequence[Course], is_first: bool) -> bool:
            found = exchange(courses[0].step, is_first)
            courses[0].step = courses[0].step if found is None else found
            return found is not None

        return meet

    def end(self, ended: list[Course]) -> None:
        """Checks, measures and saves lanes that have taken their last step; notes why the others ended."""
        assert self.engine is not None
        self.engine.check_unchanged()
        for course in ended:
            label = course.lane.name
            try:
                self.made[label] = course.error or self.finish(label, course)
            except TrainError as error:
                self.made[label] = course.error = error
            if course.error is not None and rank() == 0:
                write_end(course.folder, course.recipe, End(None, str(course.error)))

    def finish(self, label: str, course: Course) -> Facts:
        """Checks, measures and saves one lane that has taken its last step; returns its facts.

        Raises:
            TrainError: if a check of the certificate fails.
        """
        engine, training = self.engine, self.trainings[label]
        assert engine is not None
        engine.check_same(course)
        facts: Facts = {"resumed_after_step": course.first_step} | engine.facts()
        facts["num_trainable"] = sum(p.numel() for p in course.lane.parameters.values())
        if course.held_out is not None:
            facts["validation_loss"] = engine.validation_loss(course)
        facts |= training_facts(training, time.monotonic() - self._started, course.step - course.first_step)
        facts["lanes"] = len(self.courses)
        if rank() == 0:
            save_lane(course.lane, course.folder, training.base)
            check_saved(course.certificate, course.lane.state(), course.lane.lora.lora_rank, course.folder)
            write_provenance(course.folder, provenance(training, facts.get("validation_loss")))
        facts["certificate"] = engine.certificate.table() + course.certificate.table()
        if rank() == 0:
            write_end(course.folder, course.recipe, End(facts, ""))
        return facts
