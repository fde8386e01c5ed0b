"""Which strategy trains: the one that was named, or with `auto` the one that fits."""

from __future__ import annotations

import torch

from qlora_dist.config.model import Quantization
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import StrategyName
from qlora_dist.model.base import Base
from qlora_dist.runtime import log
from qlora_dist.train.memory import free_memory_bytes
from qlora_dist.train.strategies import Strategy
from qlora_dist.train.strategies.ddp import ReplicatedBase
from qlora_dist.train.strategies.fsdp import ShardedBase


def choose_strategy(config: AdapterConfig, base: Base) -> Strategy:
    """Returns the strategy of this training; with `auto`, all ranks come to the same one.

    The whole base on each rank sends one small message a step, a sharded one sends itself at each micro-batch: so
    `ddp` wherever the base, adapters and activations fit.
    """
    replicated = ReplicatedBase()
    name = config.strategy.name
    if name is StrategyName.auto:
        too_big = torch.tensor([float(needed_bytes(config, base) > 0.9 * free_memory_bytes())])
        too_big = too_big.to(replicated.device)
        replicated.sum_over_ranks([too_big])
        name = StrategyName.fsdp if too_big.item() and replicated.world_size > 1 else StrategyName.ddp
        log.info("strategy=auto: %s, since ddp needs %.2f GB", name.name, needed_bytes(config, base) / 1e9)
    if name is StrategyName.deepspeed:
        from qlora_dist.train.strategies.deepspeed import ZeroBase

        return ZeroBase(config.strategy.zero_stage)
    return ShardedBase(config.strategy.ranks_per_group) if name is StrategyName.fsdp else replicated


def needed_bytes(config: AdapterConfig, base: Base) -> int:
    """Estimates what a rank holds with the whole base on it: weights, adapters with Adam, activations, in bytes.

    NF4 with double quantization takes 4.127 bits a value (QLoRA, arXiv 2305.14314, section 3); embedding and head
    stay in 16 bits. Activations follow a Llama's shape (intermediate size 3.5 x hidden, a quarter of heads for keys).
    """
    width = getattr(torch, config.model.compute_dtype.name).itemsize
    outside = 2 * base.vocab_size * base.hidden_size
    linear = max(base.num_parameters - outside, 0)
    bits = 4.127 if config.model.quantization is Quantization.nf4 else 8.0 * width
    adapters = 16 * linear * 2 * config.lora.lora_rank / base.hidden_size
    a_token = base.num_layers * base.hidden_size * width * (1 if config.train.activation_checkpointing else 11.5)
    return int(linear * bits / 8 + outside * width + adapters + a_token * config.train.micro_batch_tokens)
