"""What a training will hold in memory, told beforehand from the base's shape: weights once, and so much for each lane.

h hidden size, q and k the widths of the query and key projections, I of the feed-forward, L layers, N the parameters
of the decoder's linear layers, T tokens of a row, V the vocabulary, w bytes of a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.train import Checkpointing, LoraConfig, TrainConfig

NF4_BITS = 4.127
"""Bits a weight, with double quantization in blocks of 64 (QLoRA, arXiv 2305.14314, section 3)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a base, as far as they decide what memory holds."""

    hidden: int
    query: int
    key: int
    intermediate: int
    num_layers: int
    vocab: int
    tied: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns the inputs and outputs of a decoder layer's linear layers, by the last part of their names."""
        h, q, k, i = self.hidden, self.query, self.key, self.intermediate
        attention = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}


def shape_of(model: ModelConfig) -> Shape | None:
    """Returns a base's shape from its config, or None for one that isn't on this machine."""
    if not model.path:
        tiny = model.tiny
        key = tiny.hidden_size // tiny.num_heads * tiny.num_key_value_heads
        return Shape(
            tiny.hidden_size, tiny.hidden_size, key, tiny.intermediate_size, tiny.num_layers, tiny.vocab_size, True
        )
    return shape_in(Path(model.path).expanduser())


def shape_in(folder: Path) -> Shape | None:
    """Returns the shape of the model in a folder, or None where its `config.json` doesn't tell it."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _from_fields(fields | fields.get("text_config", {}))
    except (OSError, ValueError, KeyError):
        return None


def _from_fields(fields: Mapping[str, Any]) -> Shape:
    heads, hidden = int(fields["num_attention_heads"]), int(fields["hidden_size"])
    width = int(fields.get("head_dim") or hidden // heads)
    return Shape(
        hidden,
        heads * width,
        int(fields.get("num_key_value_heads") or heads) * width,
        int(fields["intermediate_size"]),
        int(fields["num_hidden_layers"]),
        int(fields["vocab_size"]),
        bool(fields.get("tie_word_embeddings")),
    )


def base_bytes(shape: Shape, model: ModelConfig) -> int:
    """Returns the bytes of the frozen weights: held once, however many lanes there are."""
    num_linear = shape.num_layers * sum(i * o for i, o in shape.linears().values())
    num_outer = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    width = _width(model)
    linear_bytes = NF4_BITS / 8 if model.quantization is Quantization.nf4 else width
    return int(num_linear * linear_bytes + num_outer * width)


def lane_bytes(
    shape: Shape, model: ModelConfig, lora: LoraConfig, train: TrainConfig, recomputes: bool | None = None
) -> int:
    """Returns the bytes of one lane: its factors with gradient and moments, and the activations of its micro-batch.

    Args:
        shape: of the base.
        model: how it is stored and computed.
        lora: what is adapted.
        train: how much is seen at once.
        recomputes: whether activations are computed again; None asks the config, where `auto` counts as `off`.
    """
    if recomputes is None:
        recomputes = train.activation_checkpointing is Checkpointing.on
    linears = shape.linears()
    adapted = [linears[name] for name in lora.target_modules or linears if name in linears]
    num_factors = shape.num_layers * lora.lora_rank * sum(i + o for i, o in adapted)
    return trained_bytes(train) * num_factors + activation_bytes(shape, _width(model), train, recomputes)


def trained_bytes(train: TrainConfig) -> int:
    """Returns the bytes of one trained value: itself and its gradient in float32, and Adam's two moments of it."""
    return 8 + train.optimizer.moment_bytes


def activation_bytes(shape: Shape, width: int, train: TrainConfig, recomputes: bool) -> int:
    """Returns the bytes that a micro-batch leaves for its backward pass.

    A decoder layer keeps, for each token, 2h in float32 (inputs of its norms), and in the compute dtype 2h (what they
    give), 4q (queries, keys and values of all heads, attention's output), 4I and T (a row of the mask). Recomputed,
    it keeps h, and one layer at a time the rest. Counted by `tests/unit/model/test_footprint.py` on a real model.
    """
    h, q, inner = shape.hidden, shape.query, shape.intermediate
    a_layer = 8 * h + width * (2 * h + 4 * q + 4 * inner + train.row_tokens)
    kept = shape.num_layers * h * width + a_layer if recomputes else shape.num_layers * a_layer
    return train.micro_batch_tokens * kept


def _width(model: ModelConfig) -> int:
    return 4 if model.compute_dtype is Dtype.float32 else 2
