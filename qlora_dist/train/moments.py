"""How AdamW's moments are held: by torch in 32 bits, or by bitsandbytes in 8 (arXiv 2110.02861) or in pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora_dist.config.train import Optimizer, TrainConfig
from qlora_dist.errors import bad_value
from qlora_dist.runtime import device

_HELD = ("state1", "absmax1", "state2", "absmax2")
"""What bitsandbytes keeps of a factor: two moments, and where they are coded, the scale of each 256 values."""


def adamw(train: TrainConfig, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """Makes AdamW as the recipe has it, its moments held as `train.optimizer` says.

    Raises:
        ConfigError: for pages without a GPU, where bitsandbytes would quietly do without.
    """
    kind = train.optimizer
    if kind.is_paged and device().type != "cuda":
        wanted = f"{kind.name.removeprefix('paged_')} without a GPU: pages move from a GPU's memory to the host's"
        raise bad_value("train.optimizer", kind.name, wanted)
    made: torch.optim.Optimizer = _class_of(kind)(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.weight_decay,
        **options,
    )
    return made


def _class_of(kind: Optimizer) -> Any:
    if kind is Optimizer.adamw:
        return torch.optim.AdamW
    import bitsandbytes.optim

    names = {
        Optimizer.adamw_8bit: "AdamW8bit",
        Optimizer.paged_adamw: "PagedAdamW",
        Optimizer.paged_adamw_8bit: "PagedAdamW8bit",
    }
    return getattr(bitsandbytes.optim, names[kind])


class FactorAdam:
    """bitsandbytes' AdamW of one lane, factor by factor: no code spans two factors, so a lane's neighbours don't count.

    Args:
        train: the recipe.
        values: the lane's factors by name, contiguous views; factors of less than 4,096 values keep 32 bits.
        grads: where their gradients are summed, alike.
    """

    def __init__(
        self, train: TrainConfig, values: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor]
    ) -> None:
        self._factors = {name: nn.Parameter(value) for name, value in values.items()}
        for name, factor in self._factors.items():
            factor.grad = grads[name]
        self._adam: Any = adamw(train, list(self._factors.values()))
        self._step = torch.zeros((), device=device())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Is where the learning rate is set."""
        groups: list[dict[str, Any]] = self._adam.param_groups
        return groups

    def step(self) -> None:
        """Takes one step."""
        step = int(self._step)  # asked once: on a GPU each question waits for all that was asked of it before
        for state in self._adam.state.values():
            state["step"] = step
        self._adam.step()
        self._step += 1

    def named_state(self) -> dict[str, torch.Tensor]:
        """Returns `#step`, and what is kept of each factor, live, as `<factor>#<what>`; zeros before any step."""
        named = {"#step": self._step}
        for index, (name, factor) in enumerate(self._factors.items()):
            if not (state := self._adam.state[factor]):
                self._adam.init_state(self.param_groups[0], factor, 0, index)
            named |= {f"{name}#{what}": state[what] for what in _HELD if what in state}
        return named
