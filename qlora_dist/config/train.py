"""What an adapter is, how it is trained, and over how many processes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import execution, setting
from qlora_dist.errors import bad_value


class Method(Enum):
    """What is trained: LoRA factors, or every weight of the base."""

    lora = "lora"
    full = "full"


class Optimizer(Enum):
    """How Adam's moments are held: in 32 bits, in 8 (arXiv 2110.02861), or in pages that leave a full GPU."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw = "paged_adamw"
    paged_adamw_8bit = "paged_adamw_8bit"

    @property
    def is_paged(self) -> bool:
        """Says whether moments lie in unified memory, which moves to the host when a GPU is full."""
        return self in (Optimizer.paged_adamw, Optimizer.paged_adamw_8bit)

    @property
    def moment_bytes(self) -> int:
        """Is the bytes that both moments of one trained value take."""
        return 2 if self in (Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit) else 8


class Schedule(Enum):
    """How the learning rate moves after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class StrategyName(Enum):
    """How the processes of one training share the work."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    deepspeed = "deepspeed"
    auto = "auto"

    @property
    def divides(self) -> bool:
        """Says whether it is made to divide over processes, so that one alone has no use for it."""
        return self in (StrategyName.fsdp, StrategyName.deepspeed)


class Checkpointing(Enum):
    """Whether activations are computed again in the backward pass, not kept; `auto`: where memory is short."""

    off = "off"
    on = "on"
    auto = "auto"


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """The shape and scale of an adapter (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732)."""

    lora_rank: int = setting(8, at_least=1, at_most=4096)
    lora_alpha: float = setting(16.0, above=0)
    lora_dropout: float = setting(0.0, at_least=0, below=1)
    target_modules: list[str] = setting(list)
    use_rslora: bool = False


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The recipe of one training. Budgets are in tokens, so that one GPU and eight take the same step."""

    method: Method = setting(Method.lora)
    row_tokens: int = setting(256, at_least=8)
    tokens_per_step: int = setting(4096, at_least=8)
    epochs: float = setting(1.0, above=0)
    max_steps: int = setting(0, at_least=0)
    learning_rate: float = setting(2e-4, above=0, at_most=1)
    schedule: Schedule = setting(Schedule.cosine)
    warmup_share: float = setting(0.05, at_least=0, below=1)
    weight_decay: float = setting(0.0, at_least=0)
    optimizer: Optimizer = setting(Optimizer.adamw)
    adam_beta1: float = setting(0.9, at_least=0, below=1)
    adam_beta2: float = setting(0.999, at_least=0, below=1)
    max_grad_norm: float = setting(1.0, above=0)
    micro_batch_tokens: int = execution(2048, at_least=8)
    activation_checkpointing: Checkpointing = execution(Checkpointing.off)
    compile: bool = execution(False)
    log_every_steps: int = execution(1, at_least=1)
    checkpoint_every_s: float = execution(600.0, at_least=0)
    dense_cache_share: float = execution(-1.0, at_least=-1, below=1)

    def check(self, key: str) -> None:
        """Refuses token budgets that are no whole number of rows or micro-batches."""
        if self.micro_batch_tokens % self.row_tokens and key == "sweep":  # it varies rows, but not micro-batches
            wanted = f"a multiple of row_tokens = {self.row_tokens}"
            repair = "Set it to a multiple of train.row_tokens and of every row_tokens of the sweep."
            raise bad_value("train.micro_batch_tokens", self.micro_batch_tokens, wanted, repair)
        if self.micro_batch_tokens % self.row_tokens:
            wanted = f"a multiple of {key}.row_tokens = {self.row_tokens}"
            repair = f"Set {key}.micro_batch_tokens={_up(self.micro_batch_tokens, self.row_tokens)}."
            raise bad_value(f"{key}.micro_batch_tokens", self.micro_batch_tokens, wanted, repair)


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """How many processes train one adapter, and how they share it."""

    name: StrategyName = execution(StrategyName.single)
    world_size: int = execution(1, at_least=1)
    ranks_per_group: int = execution(0, at_least=0)
    zero_stage: int = execution(2, at_least=2, at_most=3)
    timeout_s: float = execution(600.0, above=0)

    def check(self, key: str) -> None:
        """Refuses several processes for the strategy of one, and one for those that divide."""
        if self.name is StrategyName.single and self.world_size > 1:
            raise bad_value(f"{key}.world_size", self.world_size, f"1 with {key}.name=single")
        if self.name.divides and self.world_size == 1:
            wanted = f"2 or more with {key}.name={self.name.name}, which divides"
            raise bad_value(f"{key}.world_size", 1, wanted, "Set strategy=ddp for one process.")
        if self.ranks_per_group == 1:
            wanted = "0 for all, or 2 or more, since a group of one divides nothing"
            raise bad_value(f"{key}.ranks_per_group", 1, wanted, "Set strategy=ddp to hold the base whole.")
        if self.ranks_per_group and self.name is not StrategyName.fsdp:
            raise bad_value(f"{key}.ranks_per_group", self.ranks_per_group, f"0 with {key}.name={self.name.name}")


def check_step(train: TrainConfig, world_size: int) -> None:
    """Refuses a step that does not divide into whole micro-batches over all ranks.

    Raises:
        ConfigError: naming the nearest budget that does divide.
    """
    unit = train.micro_batch_tokens * world_size
    if train.tokens_per_step % unit:
        wanted = (
            f"a multiple of train.micro_batch_tokens x strategy.world_size = {train.micro_batch_tokens} x {world_size}"
        )
        repair = f"Set train.tokens_per_step={_up(train.tokens_per_step, unit)}."
        raise bad_value("train.tokens_per_step", train.tokens_per_step, wanted, repair)


def check_supported(train: TrainConfig, strategy: StrategyConfig) -> None:
    """Refuses what no strategy does: docs/strategies.md has the table.

    Raises:
        ConfigError: naming the key and the reason.
    """
    if train.method is Method.full and strategy.name is not StrategyName.single:
        repair = "Set strategy=single, or train.method=lora."
        raise bad_value("train.method", "full", f"lora with strategy={strategy.name.name}", repair)
    if train.optimizer is not Optimizer.adamw and strategy.name is StrategyName.deepspeed:
        wanted = "adamw with strategy=deepspeed, which divides the moments over the processes"
        repair = "Set train.optimizer=adamw, or strategy=ddp or fsdp."
        raise bad_value("train.optimizer", train.optimizer.name, wanted, repair)
    if train.compile and strategy.name in (StrategyName.single, StrategyName.deepspeed):
        wanted = f"false with strategy={strategy.name.name}, which runs the layers in its own way"
        raise bad_value("train.compile", "true", wanted, "Set strategy=ddp, fsdp or auto.")
    if train.compile and train.activation_checkpointing is not Checkpointing.off:
        asked = train.activation_checkpointing.name
        wanted = f"false with train.activation_checkpointing={asked}: torch compiles no layer that it computes again"
        raise bad_value("train.compile", "true", wanted, "Set one of the two off.")
    if strategy.ranks_per_group and strategy.world_size % strategy.ranks_per_group:
        wanted = f"a divisor of strategy.world_size = {strategy.world_size}"
        raise bad_value("strategy.ranks_per_group", strategy.ranks_per_group, wanted)


def gradient_accumulation(train: TrainConfig, world_size: int) -> int:
    """Returns the micro-steps of one rank in one optimizer step, derived from the token budget."""
    check_step(train, world_size)
    return train.tokens_per_step // (train.micro_batch_tokens * world_size)


def _up(value: int, unit: int) -> int:
    return max(1, -(-value // unit)) * unit
