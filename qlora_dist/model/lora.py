"""Putting LoRA factors on a base, and counting what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_dist.errors import bad_value, nearest

if TYPE_CHECKING:
    from qlora_dist.config.train import LoraConfig


def peft_config(lora: LoraConfig) -> Any:
    """Returns PEFT's config of an adapter; no `target_modules` means every linear layer but the head."""
    import peft

    return peft.LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=sorted(lora.target_modules) or "all-linear",
        use_rslora=lora.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach_lora(model: Any, lora: LoraConfig) -> Any:
    """Returns the model with fresh float32 LoRA factors, drawn from torch's current seed.

    Raises:
        ConfigError: if `lora.target_modules` names a layer that the model has not, or its head.
    """
    import peft

    head = model.get_output_embeddings()
    layers = {name.rsplit(".", 1)[-1]: m for name, m in model.named_modules() if "Linear" in type(m).__name__}
    linear = {name for name, module in layers.items() if module is not head}
    for name in lora.target_modules:
        if name in layers and name not in linear:
            wanted = "linear layers of the decoder: the head stays as it is, and its loss is computed in chunks"
            raise bad_value("lora.target_modules", name, wanted)
        if name not in linear:
            raise bad_value("lora.target_modules", name, "a linear layer of the base", nearest(name, linear))
    return peft.get_peft_model(model, peft_config(lora))


def num_trainable(model: Any) -> int:
    """Returns the number of values that an optimizer step changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
