"""An engine: a frozen base with lanes on it, placed by a strategy, and the checks that are made of both."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qlora_dist.config.model import ModelConfig
from qlora_dist.config.train import TrainConfig
from qlora_dist.errors import TrainError
from qlora_dist.model.base import Base, load_model
from qlora_dist.model.frozen import keep_dense_within
from qlora_dist.model.kernels import use_kernels
from qlora_dist.model.prequantized import PrequantizedReader, build_skeleton, is_stored
from qlora_dist.runtime import Facts
from qlora_dist.train.certificate import Certificate, Check
from qlora_dist.train.checks import (
    base_fingerprint,
    check_base,
    check_loss,
    check_no_leak,
    check_placement,
    check_rows,
    check_unchanged,
    probe_of,
)
from qlora_dist.train.compiled import compile_layers
from qlora_dist.train.course import Course
from qlora_dist.train.first_steps import check_apart
from qlora_dist.train.lanes import Lane, attach_lanes
from qlora_dist.train.loss import LaneModel
from qlora_dist.train.memory import free_memory_bytes
from qlora_dist.train.step import Stepper
from qlora_dist.train.strategies import Strategy
from qlora_dist.train.strategies.choice import recomputes
from qlora_dist.train.strategies.ddp import frozen_parameters
from qlora_dist.train.validation import row_losses


@dataclass(slots=True)
class Engine:
    """A base with lanes on it, placed by a strategy and ready to step."""

    stepper: Stepper
    whole_bytes: int = 0
    dense_cache_bytes: int = 0
    recomputes: bool = False
    certificate: Certificate = field(default_factory=Certificate)
    fingerprint: list[int] = field(default_factory=list)

    @classmethod
    def build(cls, model: ModelConfig, base: Base, lanes: list[Lane], strategy: Strategy) -> Engine:
        """Loads the base, puts the lanes on it, and places it."""
        train = lanes[0].train
        recomputed = recomputes(model, base, lanes, strategy)  # asked while the base isn't loaded, but counted
        stored = is_stored(base, model)
        loaded = build_skeleton(base, model) if stored else load_model(base, model)
        use_kernels(loaded, model)
        seating = attach_lanes(loaded, lanes)
        for lane in lanes:
            lane.make_optimizer()
        if recomputed:
            loaded.activation_checkpointing_enable({"use_reentrant": False})
        if train.compile:
            compile_layers(loaded)
        engine = cls(Stepper(LaneModel(loaded).train(), lanes, seating, strategy), recomputes=recomputed)
        if stored:
            engine.place_stored(base, model)
        else:
            engine.place(model)
        strategy.adopt(lanes)
        if strategy.num_parts == 1:
            engine.dense_cache_bytes = keep_dense_within(engine.stepper.model, cache_budget(train, strategy.device))
        return engine

    def place(self, model: ModelConfig) -> None:
        """Places a base that is in memory whole."""
        self._measure(model)
        self.stepper.strategy.prepare(self.stepper.model)

    def place_stored(self, base: Base, model: ModelConfig) -> None:
        """Places a pre-quantized base: read whole, or divided first, so that each rank reads its part alone."""
        lane_model = self.stepper.model
        with PrequantizedReader(base) as reader:
            reader.shape_on_meta(lane_model.model)
            self._measure(model)
            self.stepper.strategy.read(lane_model, reader)

    def _measure(self, model: ModelConfig) -> None:
        """Notes the base's bytes and dtypes while its parameters have their whole shapes."""
        self.whole_bytes = sum(p.numel() * p.element_size() for p in frozen_parameters(self.stepper.model))
        check_base(self.certificate, self.stepper.model, model)

    def facts(self) -> Facts:
        """Returns what the manifest says of how the base was held."""
        return {
            "strategy": self.stepper.strategy.name,
            "base_bytes_per_rank": self.stepper.strategy.base_bytes(self.stepper.model),
            "dense_cache_bytes": self.dense_cache_bytes,
            "activation_checkpointing": "on" if self.recomputes else "off",
        }

    def examine(self, courses: list[Course]) -> None:
        """Makes the checks that come before the first step; a lane that doesn't pass its own ends alone."""
        check_placement(self.certificate, self.stepper.model, self.stepper.strategy, self.whole_bytes)
        seen: dict[int, list[Check]] = {}
        device = self.stepper.strategy.device
        for course in courses:
            try:
                check_rows(course.certificate, course.lane.rows, course.lane.budget)
                if id(course.lane.rows) not in seen:
                    known = len(course.certificate.checks)
                    check_loss(course.certificate, self.stepper, course.lane)
                    check_no_leak(course.certificate, course.lane.rows, device, probe_of(self.stepper))
                    seen[id(course.lane.rows)] = course.certificate.checks[known:]
                else:  # lanes that share their rows share what was found on them
                    course.certificate.checks += seen[id(course.lane.rows)]
            except TrainError as error:
                course.fail(error)
        numbers = {id(lane): k for k, lane in enumerate(self.stepper.lanes)}
        check_apart(self.certificate, self.stepper, [numbers[id(c.lane)] for c in courses if c.error is None])
        self.fingerprint = base_fingerprint(self.stepper.model)

    def check_unchanged(self) -> None:
        """Checks that the base holds the bytes that it held before the first step."""
        check_unchanged(self.certificate, self.fingerprint, base_fingerprint(self.stepper.model))

    def check_same(self, course: Course) -> None:
        """Checks that all ranks have the same adapter."""
        strategy = self.stepper.strategy
        mine = [p.detach() for p in course.lane.parameters.values()]
        theirs = [p.clone() for p in mine]
        strategy.broadcast(theirs)
        different = torch.tensor([float(any(not torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)))])
        different = different.to(strategy.device)
        strategy.sum_over_ranks([different])
        course.certificate.require(
            "all ranks hold the same adapter",
            not different.item(),
            f"{int(different.item())} of {strategy.world_size} ranks differ from rank 0",
            "The ranks took different steps: check that they run the same versions on the same kind of device.",
        )

    def validation_loss(self, course: Course) -> float:
        """Returns the mean loss of a course's lane on its held-out rows, each rank doing its share."""
        assert course.held_out is not None
        stepper = self.stepper
        lane = next(k for k, lane in enumerate(stepper.lanes) if lane is course.lane)
        totals = row_losses(stepper, course.held_out, course.lane.train.micro_batch_tokens, lane)
        stepper.strategy.sum_over_ranks([totals])
        return float(totals[0] / totals[1])


def cache_budget(train: TrainConfig, device: torch.device) -> int:
    """Returns the bytes for dequantized weights: a share of the free memory; below 0, a quarter on a CPU, else none."""
    share = train.dense_cache_share
    if share < 0:
        share = 0.25 if device.type == "cpu" else 0.0
    return int(share * free_memory_bytes())
