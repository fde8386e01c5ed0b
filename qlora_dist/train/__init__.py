"""Training: the standard Hugging Face workflow, the loop of lanes, and what both share."""

from qlora_dist.train.adapter import train_adapter

__all__ = ["train_adapter"]
