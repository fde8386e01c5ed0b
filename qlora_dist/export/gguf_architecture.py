"""What llama.cpp must know of a model's shape, for the architectures that are exported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_dist.errors import ModelError
from qlora_dist.runtime import log

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Hugging Face's `model_type`, and the name of the architecture in `gguf.MODEL_ARCH`."""
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_PERMUTED = ("llama", "mistral")


def gguf_arch(config: Mapping[str, Any]) -> Any:
    """Returns the `gguf.MODEL_ARCH` of a model.

    Raises:
        ModelError: for an architecture that isn't exported, by name.
    """
    import gguf

    refuse_architecture(config)
    return gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]


def refuse_architecture(config: Mapping[str, Any]) -> None:
    """Refuses a model whose layers or rotary embedding llama.cpp isn't told of here.

    Raises:
        ModelError: naming what isn't known, and what is.
    """
    kind, rotary = config.get("model_type"), rope(config)["rope_type"]
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        repair = "Export with --to hf, and convert that folder with llama.cpp's own convert_hf_to_gguf.py."
        raise ModelError(f"model_type={kind}: --to gguf knows {known}. {repair}")
    if rotary not in ROPE_TYPES:
        raise ModelError(f"rope_type={rotary}: --to gguf knows {', '.join(ROPE_TYPES)}. Export with --to hf.")


def tensor_names(config: Mapping[str, Any]) -> Any:
    """Returns gguf's map from Hugging Face's tensor names to llama.cpp's."""
    import gguf

    return gguf.get_tensor_name_map(gguf_arch(config), int(config["num_hidden_layers"]))


def gguf_name(names: Any, name: str) -> str:
    """Returns llama.cpp's name of a tensor.

    Raises:
        ModelError: if it has none.
    """
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"{name}: llama.cpp's architecture has no such tensor. Export with --to hf.")
    return found


def permuted(config: Mapping[str, Any], name: str, rows_OX: torch.Tensor) -> torch.Tensor:
    """Returns the rows of a query or key projection in llama.cpp's order of rotary halves; others as they are.

    Llama's files interleave the two halves of each head where transformers puts one after the other.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": num_key_value_heads(config)}
    layer = next((part for part in heads if f".{part}" in name), None)
    if layer is None or config["model_type"] not in _PERMUTED:
        return rows_OX
    shape = rows_OX.shape
    halves = rows_OX.reshape(heads[layer], 2, shape[0] // heads[layer] // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def num_key_value_heads(config: Mapping[str, Any]) -> int:
    """Returns how many heads share keys and values, all where the config doesn't say."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_size(config: Mapping[str, Any]) -> int:
    """Returns the width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_shape(writer: Any, config: Mapping[str, Any]) -> None:
    """Writes the model's shape into a GGUF file's header."""
    context = int(config["max_position_embeddings"])
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(context)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(num_key_value_heads(config))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_freq_base(float(rope(config)["rope_theta"]))
    _add_rope_scaling(writer, rope(config))
    window = config.get("sliding_window")
    if window and window < context and config.get("use_sliding_window", config["model_type"] == "mistral"):
        log.warning("sliding_window=%d: llama.cpp attends to all of a longer text, transformers doesn't.", window)


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary embedding's parameters, from the old fields of a config or the new one."""
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    found = old | (config.get("rope_parameters") or {})
    return found | {"rope_type": found.get("rope_type") or found.get("type") or "default"}


def _add_rope_scaling(writer: Any, parameters: Mapping[str, Any]) -> None:
    import gguf

    kind = parameters["rope_type"]
    if kind in ("default", "llama3"):  # llama3's factors are a tensor, see `rope_factors`
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(parameters["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))


def rope_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns what each rotary frequency is divided by in Llama 3.1's scaling, None for other models."""
    import torch

    parameters = rope(config)
    if parameters["rope_type"] != "llama3":
        return None
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    old_context, factor = float(parameters["original_max_position_embeddings"]), float(parameters["factor"])
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float64) / head_size(config)
    turns = old_context / (2 * math.pi * float(parameters["rope_theta"]) ** exponents)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
