"""Which strategy trains: the one that was named, or with `auto` the one that fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from qlora_dist.config.model import ModelConfig
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import Checkpointing, LoraConfig, Method, StrategyName, TrainConfig
from qlora_dist.model.base import Base
from qlora_dist.model.footprint import Shape, activation_bytes, base_bytes, lane_bytes, shape_in, trained_bytes
from qlora_dist.runtime import log
from qlora_dist.train.loss import CHUNK_VALUES
from qlora_dist.train.memory import free_memory_bytes
from qlora_dist.train.strategies import Strategy
from qlora_dist.train.strategies.ddp import ReplicatedBase
from qlora_dist.train.strategies.fsdp import ShardedBase

FITS = 0.9
"""The share of the free memory that what is needed may take."""


class Recipe(Protocol):
    """What decides how much a lane holds."""

    @property
    def lora(self) -> LoraConfig:
        """Is the shape of its factors."""

    @property
    def train(self) -> TrainConfig:
        """Is how much it sees at once."""


def choose_strategy(config: AdapterConfig, base: Base) -> Strategy:
    """Returns the strategy of this training; with `auto`, all ranks come to the same one.

    The whole base on each rank sends one small message a step, a sharded one sends itself at each micro-batch: so
    `ddp` wherever the base, adapters and activations fit.
    """
    replicated = ReplicatedBase()
    name = config.strategy.name
    if name is StrategyName.auto:
        asked = config.train.activation_checkpointing
        needed = needed_bytes(config.model, base, [config], asked is not Checkpointing.off)
        too_big = torch.tensor([float(needed > FITS * free_memory_bytes())])
        too_big = too_big.to(replicated.device)
        replicated.sum_over_ranks([too_big])
        name = StrategyName.fsdp if too_big.item() and replicated.world_size > 1 else StrategyName.ddp
        log.info("strategy=auto: %s, since ddp needs %.2f GB", name.name, needed / 1e9)
    if name is StrategyName.deepspeed:
        from qlora_dist.train.strategies.deepspeed import ZeroBase

        return ZeroBase(config.strategy.zero_stage)
    return ShardedBase(config.strategy.ranks_per_group) if name is StrategyName.fsdp else replicated


def recomputes(model: ModelConfig, base: Base, lanes: Sequence[Recipe], strategy: Strategy) -> bool:
    """Says whether activations are computed again: as the config has it, with `auto` where they don't fit.

    All ranks come to the same answer, as a sharded base needs.
    """
    asked = lanes[0].train.activation_checkpointing
    if asked is not Checkpointing.auto:
        return asked is Checkpointing.on
    needed = needed_bytes(model, base, lanes, False, strategy.num_parts)
    is_short = torch.tensor([float(needed > FITS * free_memory_bytes())], device=strategy.device)
    strategy.sum_over_ranks([is_short])
    answer = bool(is_short.item())
    log.info("activation_checkpointing=auto: %s, since off needs %.2f GB", "on" if answer else "off", needed / 1e9)
    return answer


def needed_bytes(model: ModelConfig, base: Base, lanes: Sequence[Recipe], recomputed: bool, num_parts: int = 1) -> int:
    """Returns the bytes that a rank holds by the memory model: its part of the base, lanes, a chunk of logits."""
    shape = shape_in(base.folder()) or _like_llama(base)
    held = sum(lane_bytes(shape, model, lane.lora, lane.train, recomputed) for lane in lanes)
    tokens = sum(lane.train.micro_batch_tokens for lane in lanes)
    logits = 8 * min(CHUNK_VALUES, tokens * shape.vocab)
    return base_bytes(shape, model) // num_parts + held + logits


def standard_bytes(config: AdapterConfig, base: Base) -> int:
    """Returns what the standard workflow holds without recomputation: logits are whole there, in 12 bytes a value.

    PEFT keeps a float32 copy of each adapted layer's input. Full fine-tuning holds each parameter and its gradient in
    float32, and its moments.
    """
    shape, train = shape_in(base.folder()) or _like_llama(base), config.train
    logits = 12 * train.micro_batch_tokens * shape.vocab
    if train.method is Method.full:
        return trained_bytes(train) * base.num_parameters + activation_bytes(shape, 4, train, False) + logits
    inputs = shape.num_layers * sum(i for i, _ in shape.linears().values())
    return needed_bytes(config.model, base, [config], False) + logits + 4 * train.micro_batch_tokens * inputs


def _like_llama(base: Base) -> Shape:
    """Returns a Llama's widths for a base whose config names its own otherwise."""
    h = base.hidden_size
    return Shape(h, h, h // 4, 7 * h // 2, base.num_layers, base.vocab_size)
