"""Training: the standard Hugging Face workflow, the loop of lanes, and what both share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_dist.train.adapter import train_adapter

if TYPE_CHECKING:
    from qlora_dist.train.joint import train_adapters

__all__ = ["train_adapter", "train_adapters"]


def __getattr__(name: str) -> Any:
    if name == "train_adapters":
        from qlora_dist.train.joint import train_adapters  # torch comes with it

        return train_adapters
    raise AttributeError(name)
