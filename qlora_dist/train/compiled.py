"""`train.compile=true`: torch.compile makes one kernel each of what lies between the products of a decoder layer."""

from __future__ import annotations

import os
import shutil
from functools import cache
from typing import Any

import torch

from qlora_dist.errors import ConfigError
from qlora_dist.model.frozen import FrozenLinear
from qlora_dist.runtime import device
from qlora_dist.train.lanes import LaneLinear


def check_compiler() -> None:
    """Refuses to compile where the compiler that torch calls is absent.

    Raises:
        ConfigError: naming it.
    """
    name = os.environ.get("CXX", "g++")
    if device().type == "cpu" and shutil.which(name) is None:
        raise ConfigError(
            f"train.compile=true needs a C++ compiler; {name} isn't here. Install it, or set it to false."
        )


def compile_layers(model: Any) -> None:
    """Has norms, rotations, activations and attention of each decoder layer compiled, at its first step.

    Products of adapted and frozen layers are left out: they read what changes between micro-batches (whose rows are
    where) and call bitsandbytes' kernels, and a matrix product gains nothing.
    """
    _leave_out(LaneLinear)
    _leave_out(FrozenLinear)
    for layer in model.get_decoder().layers:
        layer.compile()


@cache
def _leave_out(kind: type[LaneLinear | FrozenLinear]) -> None:
    """Leaves out the class once: for layers with a forward of their own torch would compile one by one."""
    kind.forward = torch.compiler.disable(kind.forward)  # type: ignore[method-assign]
