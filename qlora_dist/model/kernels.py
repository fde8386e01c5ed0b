"""Which attention runs, and kernels that only GPUs have: FlashAttention, FlexAttention and Liger's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from qlora_dist.config.model import ModelConfig
from qlora_dist.errors import ConfigError, bad_value
from qlora_dist.runtime import device, log

SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
"""By attention, what transformers' model classes say of themselves; all have `eager`."""


def check_kernels(model: ModelConfig) -> None:
    """Refuses kernels that this machine can't run.

    Raises:
        ConfigError: naming the key, and what is missing: a GPU, or a package.
    """
    has_gpu = device().type == "cuda"
    if model.attention.startswith("fl") and not has_gpu:
        raise bad_value("model.attention", model.attention, "sdpa or eager, since no GPU is here")
    if model.liger and not has_gpu:
        raise bad_value("model.liger", "true", "false, since its kernels are a GPU's and none is here")
    if model.liger and find_spec("liger_kernel") is None:
        raise ConfigError("model.liger=true needs Liger's kernels. Run: pip install 'qlora_dist[gpu]'")
    if model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        repair = "Run: pip install flash-attn; or set model.attention=flex_attention, which is torch's own."
        raise ConfigError(f"model.attention=flash_attention_2 needs the package flash-attn. {repair}")


def attention_of(model: ModelConfig, config: Any) -> str:
    """Returns the attention that runs on an architecture: as asked, and with `auto` the fastest that runs everywhere.

    Raises:
        ConfigError: if the architecture hasn't the attention that was asked for, naming those that it has.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    there = ["eager", *(name for name, word in SUPPORT.items() if getattr(kind, word, False))]
    if model.attention == "auto":
        if "sdpa" not in there:
            log.info("model.attention=auto: eager, since %s has no other that runs everywhere", kind.__name__)
        return "sdpa" if "sdpa" in there else "eager"
    if model.attention not in there:
        repair = f"Set model.attention=eager, or auto; {kind.__name__} has {', '.join(there)}."
        raise bad_value("model.attention", model.attention, f"an attention that {kind.__name__} has", repair)
    return model.attention


def use_kernels(model: Any, config: ModelConfig) -> None:
    """Puts Liger's rotations, norms and feed-forward on a model, where asked for; the loss is not its own."""
    if not config.liger:
        return
    from transformers.integrations.liger import apply_liger_kernel

    own = {"rope": True, "rms_norm": True, "swiglu": True}
    apply_liger_kernel(model, own | {"cross_entropy": False, "fused_linear_cross_entropy": False})
