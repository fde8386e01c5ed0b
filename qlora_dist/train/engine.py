"""Trains lanes with the loop of this project: the base placed by a strategy, checks before, between and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_dist.config.fields import identity
from qlora_dist.config.model import ModelConfig
from qlora_dist.config.train import TrainConfig
from qlora_dist.data.rows import Rows
from qlora_dist.model.base import Base, load_model
from qlora_dist.model.frozen import keep_dense_within
from qlora_dist.model.prequantized import PrequantizedReader, build_skeleton, is_stored
from qlora_dist.runtime import Facts
from qlora_dist.train.adapter_file import check_saved, save_lane
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.checkpoint import Checkpoints
from qlora_dist.train.checks import (
    base_fingerprint,
    check_base,
    check_loss,
    check_no_leak,
    check_placement,
    check_rows,
)
from qlora_dist.train.lanes import Lane, attach_lanes
from qlora_dist.train.loop import Loop
from qlora_dist.train.loss import LaneModel
from qlora_dist.train.meeting import Exchange, Meeting
from qlora_dist.train.memory import free_memory_bytes
from qlora_dist.train.processes import joined
from qlora_dist.train.step import Stepper
from qlora_dist.train.strategies import Strategy
from qlora_dist.train.strategies.choice import choose_strategy
from qlora_dist.train.strategies.ddp import frozen_parameters
from qlora_dist.train.training import Training
from qlora_dist.train.validation import row_losses

CHECKPOINTS = "checkpoints"


def train_one_lane(training: Training, meeting: Meeting | None = None) -> Facts:
    """Trains one adapter on all ranks, with others where there is a `meeting`, and saves it from rank 0.

    Raises:
        TrainError: if a check of the certificate fails.
        Preempted: if a rank was asked to stop; the checkpoint in `out` is where the next life continues.
    """
    config, out = training.config, training.out
    lane = Lane("adapter", config.lora, config.train, config.seed, training.rows, training.budget)
    with joined(config.strategy.world_size, config.strategy.timeout_s):
        strategy = choose_strategy(config, training.base)
        engine = Engine.build(config.model, training.base, [lane], strategy)
        engine.examine()
        before = base_fingerprint(engine.stepper.model)
        checkpoints = Checkpoints(out / CHECKPOINTS, recipe_of(training))
        every_s, log_every = config.train.checkpoint_every_s, config.train.log_every_steps
        between = Exchange(meeting, training, engine.stepper, lane) if meeting is not None else None
        loop = Loop(engine.stepper, checkpoints, engine.certificate, every_s, log_every, between)
        first_step = loop.run(out / "metrics.jsonl")
        engine.check_unchanged(before)
        facts = engine.facts() | {"resumed_after_step": first_step}
        if training.held_out is not None:
            facts["validation_loss"] = engine.validation_loss(training.held_out, config.train.micro_batch_tokens)
        if engine.stepper.strategy.rank == 0:
            save_lane(lane, out, training.base)
            check_saved(engine.certificate, lane, out)
            checkpoints.remove()
        return facts | {"certificate": engine.certificate.table()}


def recipe_of(training: Training) -> dict[str, Any]:
    """Returns what a checkpoint must share with the training that continues it: all but how and where it runs."""
    rows = training.rows
    shape = [rows.num_rows, rows.row_tokens, int(rows.trained_BT.sum())]
    return {"config": identity(training.config), "base": training.base.digest, "rows": shape}


@dataclass(slots=True)
class Engine:
    """A base with lanes on it, placed by a strategy and ready to step."""

    stepper: Stepper
    whole_bytes: int = 0
    dense_cache_bytes: int = 0
    certificate: Certificate = field(default_factory=Certificate)

    @classmethod
    def build(cls, model: ModelConfig, base: Base, lanes: list[Lane], strategy: Strategy) -> Engine:
        """Loads the base, puts the lanes on it, and places it."""
        train = lanes[0].train
        stored = is_stored(base, model)
        loaded = build_skeleton(base, model) if stored else load_model(base, model)
        seating = attach_lanes(loaded, lanes)
        for lane in lanes:
            lane.make_optimizer()
        if train.activation_checkpointing:
            loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine = cls(Stepper(LaneModel(loaded).train(), lanes, seating, strategy))
        if stored:
            engine.place_stored(base, model)
        else:
            engine.place(model)
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
            if self.stepper.strategy.num_parts == 1:
                reader.fill(lane_model.model)
                self.place(model)
                return
            reader.shape_on_meta(lane_model.model)
            self._measure(model)
            self.stepper.strategy.prepare(lane_model)
            reader.fill_parts(lane_model.model)

    def _measure(self, model: ModelConfig) -> None:
        """Notes the base's bytes and dtypes while its parameters have their whole shapes."""
        self.whole_bytes = sum(p.numel() * p.element_size() for p in frozen_parameters(self.stepper.model))
        check_base(self.certificate, self.stepper.model, model)

    def facts(self) -> Facts:
        """Returns what the manifest says of how the base was held."""
        return {
            "strategy": self.stepper.strategy.name,
            "num_trainable": sum(p.numel() for lane in self.stepper.lanes for p in lane.parameters.values()),
            "base_bytes_per_rank": self.stepper.strategy.base_bytes(self.stepper.model),
            "dense_cache_bytes": self.dense_cache_bytes,
        }

    def examine(self) -> None:
        """Makes the checks that come before the first step."""
        certificate, stepper = self.certificate, self.stepper
        check_placement(certificate, stepper.model, stepper.strategy, self.whole_bytes)
        for lane in stepper.lanes:
            check_rows(certificate, lane)
            check_loss(certificate, stepper, lane)
            check_no_leak(certificate, stepper, lane)

    def check_unchanged(self, before: list[int]) -> None:
        """Checks that the base holds the bytes it held before, and that all ranks have the same adapters."""
        after = base_fingerprint(self.stepper.model)
        self.certificate.require(
            "the base is unchanged",
            before == after,
            f"checksum {after[1]:x} of this rank's part, {before[1]:x} before",
            "Something wrote to frozen weights: run again, and report it.",
        )
        strategy = self.stepper.strategy
        mine = [p.detach() for lane in self.stepper.lanes for p in lane.parameters.values()]
        theirs = [p.clone() for p in mine]
        strategy.broadcast(theirs)
        different = torch.tensor([float(any(not torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)))])
        different = different.to(strategy.device)
        strategy.sum_over_ranks([different])
        self.certificate.require(
            "all ranks hold the same adapter",
            not different.item(),
            f"{int(different.item())} of {strategy.world_size} ranks differ from rank 0",
            "The ranks took different steps: check that they run the same versions on the same kind of device.",
        )

    def validation_loss(self, rows: Rows, batch_tokens: int) -> float:
        """Returns the mean loss of the first lane on held-out rows, each rank doing its share."""
        stepper = self.stepper
        totals = row_losses(stepper, rows, batch_tokens)
        stepper.strategy.sum_over_ranks([totals])
        return float(totals[0] / totals[1])


def cache_budget(train: TrainConfig, device: torch.device) -> int:
    """Returns the bytes for dequantized weights: a share of the free memory; below 0, a quarter on a CPU, else none."""
    share = train.dense_cache_share
    if share < 0:
        share = 0.25 if device.type == "cpu" else 0.0
    return int(share * free_memory_bytes())
