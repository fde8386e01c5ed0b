"""`deepspeed`: ZeRO divides the optimizer's state (stage 2), and the frozen base too (stage 3).

The loop stays the one of all strategies: adapters whole on every rank, gradients summed once, each lane's own clip.
DeepSpeed's ZeRO-2 optimizer then steps each rank's part of the factors and gathers them; with stage 3 its hooks
gather the frozen weights a layer at a time, in 4 bits, as they are stored. So ZeRO-3's empty adapters can't be: no
factor is ever in its hands alone.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_dist.errors import ConfigError
from qlora_dist.model.frozen import FrozenLinear
from qlora_dist.model.prequantized import PrequantizedReader
from qlora_dist.train.lanes import MOMENTS, Lane, LaneLinear
from qlora_dist.train.loss import LaneModel
from qlora_dist.train.strategies.ddp import ReplicatedBase, frozen_parameters


class ZeroBase(ReplicatedBase):
    """ZeRO stage 2: the base whole on each rank, Adam's moments divided. Stage 3: the base divided as well."""

    name = "deepspeed"

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage
        self.num_parts = self.world_size if stage == 3 else 1
        self._optimizers: list[DividedAdam] = []
        _forget_earlier_groups()
        self._base_engine: Any = None

    def prepare(self, model: LaneModel) -> None:
        """Divides a base that is in memory whole."""
        if self.stage == 3:
            deepspeed = import_deepspeed()
            with _without_adapters(model):
                deepspeed.zero.Init(module=model, config_dict_or_path=zero_config(3))
                self._hook(model)

    def read(self, model: LaneModel, reader: PrequantizedReader) -> None:
        """Reads a pre-quantized base: whole, or for stage 3 layer by layer, each divided before the next is read."""
        if self.stage == 2:
            reader.fill(model.model)
            return
        deepspeed = import_deepspeed()
        with _without_adapters(model):
            for module in list(model.model.modules()):
                if any(True for _ in module.parameters(recurse=False)):
                    reader.fill_module(module)
                    deepspeed.zero.Init(module=module, config_dict_or_path=zero_config(3))
            reader.settle(model.model)
            self._hook(model)

    def _hook(self, model: LaneModel) -> None:
        """Has ZeRO-3 gather each module's weights before it computes, forward and backward, and drop them after."""
        deepspeed = import_deepspeed()
        deepspeed.utils.set_z3_leaf_modules(model, [LaneLinear, FrozenLinear], raise_if_not_found=False)
        head = model.model.get_output_embeddings()
        for parameter in head.parameters(recurse=False):  # the loss takes the head's weight, not its forward
            deepspeed.zero.register_external_parameter(model, parameter)
        self._base_engine, *_ = deepspeed.initialize(model=model, config=zero_config(3))
        for number, module in enumerate(m for m in model.modules() if hasattr(m, "ds_id")):
            module.ds_id = number  # type: ignore[assignment]  # it counts on from an earlier training, which not every process may have had

    def adopt(self, lanes: Sequence[Lane]) -> None:
        """Gives each lane an optimizer whose state is divided over the ranks."""
        for lane in lanes:
            optimizer = DividedAdam(lane)
            lane.optimizer = optimizer
            self._optimizers.append(optimizer)

    @contextmanager
    def gathered(self, lanes: Sequence[Lane]) -> Iterator[None]:
        """Has each lane's whole optimizer state at hand, on every rank, inside the `with` block."""
        own = [o for o in self._optimizers if any(lane.optimizer is o for lane in lanes)]
        for optimizer in own:
            optimizer.gather()
        try:
            yield
        finally:
            for optimizer in own:
                optimizer.state.clear()

    def scatter(self, lanes: Sequence[Lane]) -> None:
        """Takes factors and optimizer state of each lane, whole on every rank, for its own; keeps this rank's part."""
        for lane in lanes:
            assert isinstance(lane.optimizer, DividedAdam)
            lane.optimizer.scatter()

    def agree(self, wish: bool) -> bool:
        """Says whether rank 0 wishes it: gathering needs all ranks at once."""
        flag = torch.tensor([float(wish and self.rank == 0)], device=self.device)
        self.sum_over_ranks([flag])
        return bool(flag.item() > 0)

    def base_bytes(self, model: LaneModel) -> int:
        """Returns the bytes of the base's weights that this rank holds."""
        return sum(part.numel() * part.element_size() for part in map(_held, frozen_parameters(model)))


class DividedAdam(torch.optim.Optimizer):
    """AdamW of one lane in DeepSpeed's ZeRO-2 optimizer: each rank steps its part, then all gather the factors.

    `state` is empty but between `gather` and the end of a save: whole moments live nowhere else.
    """

    def __init__(self, lane: Lane) -> None:
        deepspeed = import_deepspeed()
        super().__init__([lane.values_P], {"lr": lane.train.learning_rate})
        self.state = defaultdict(dict)
        self._lane, self._factors = lane, _Factors(lane.values_P)
        train = lane.train
        inner = torch.optim.AdamW(
            self._factors.parameters(),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(model=self._factors, optimizer=inner, config=zero_config(2))
        self._inner = inner
        self._take_first_step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Steps this rank's part by the lane's gradient, and gathers all parts into the lane's factors."""
        assert self._lane.values_P.grad is not None
        for group in self._inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self._engine.backward(self._engine(self._lane.values_P.grad))
        self._engine.step()
        self._lane.values_P.data.copy_(self._factors.values_P.data)

    def gather(self) -> None:
        """Brings the whole moments and the number of steps into `state`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        shadow = self._factors.values_P
        found = {key: safe_get_full_optimizer_state(shadow, key).clone() for key in MOMENTS}
        self.state[self._lane.values_P] = {"step": self._steps()[0].detach().clone().cpu(), **found}

    def scatter(self) -> None:
        """Takes this rank's part of the lane's factors and of `state`, and empties it."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        shadow, values_P = self._factors.values_P, self._lane.values_P
        whole = self.state[values_P]
        safe_set_full_fp32_param(shadow, values_P.detach())
        shadow.data.copy_(values_P.detach())
        for key in MOMENTS:
            safe_set_full_optimizer_state(shadow, whole[key], key)
        for steps in self._steps():
            steps.fill_(float(whole["step"]))
        self.state.clear()

    def _steps(self) -> list[torch.Tensor]:
        return [state["step"] for state in self._inner.state.values()]

    def _take_first_step(self) -> None:
        """Has torch make the moments of this rank's part, by a step that moves nothing."""
        for group in self._inner.param_groups:
            group["lr"] = 0.0
        self._engine.backward(self._engine(torch.zeros_like(self._lane.values_P)))
        self._engine.step()
        for steps in self._steps():
            steps.zero_()


class _Factors(nn.Module):
    """A copy of a lane's factors in DeepSpeed's hands; `forward` gives it a gradient that is known already."""

    def __init__(self, values_P: torch.Tensor) -> None:
        super().__init__()
        self.values_P = nn.Parameter(values_P.detach().clone())

    def forward(self, gradient_P: torch.Tensor) -> torch.Tensor:
        """Returns the number whose gradient is `gradient_P`."""
        return (self.values_P * gradient_P).sum()


def zero_config(stage: int) -> dict[str, Any]:
    """Returns DeepSpeed's config for this loop, which counts tokens, clips and casts by itself."""
    zero = {"stage": stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
    }


def import_deepspeed() -> Any:
    """Imports DeepSpeed for the device at hand, quietly.

    Raises:
        ConfigError: if it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError("strategy=deepspeed needs DeepSpeed. Run: pip install 'qlora_dist[deepspeed]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory all-reduce is compiled at the first start (minutes); gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _forget_earlier_groups() -> None:
    """Drops the process groups and numbers that DeepSpeed remembers of an earlier training in this process."""
    deepspeed = import_deepspeed()
    deepspeed.zero.Init.param_id = 0
    deepspeed.comm.comm.cdb = None
    groups = deepspeed.utils.groups
    for name, value in vars(groups).items():
        if name.startswith("_") and not name.startswith("__"):
            if isinstance(value, torch.distributed.ProcessGroup):
                setattr(groups, name, None)
            elif isinstance(value, dict):
                value.clear()


@contextmanager
def _without_adapters(model: LaneModel) -> Iterator[None]:
    """Hides the bank of factors from ZeRO-3, which would divide them too."""
    bank = model.model.lanes
    del model.model.lanes
    try:
        yield
    finally:
        model.model.lanes = bank


def _held(parameter: torch.Tensor) -> torch.Tensor:
    """Returns what this rank holds of a parameter."""
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return part
