"""What a base's files don't say of its weights and its class does: which two are one, and which are held as I×O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import ModelError


@dataclass(frozen=True, slots=True)
class Architecture:
    """The weights of a base by their names in its class.

    `ends` are the names of the embedding and of the head; `is_tied` says that they are one weight. `transposed` are
    weights of layers that compute x W, not W x (GPT-2's Conv1D).
    """

    name: str
    weights: frozenset[str]
    transposed: frozenset[str]
    ends: tuple[str, str]
    is_tied: bool
    vocab_size: int


def read_architecture(base: Path) -> Architecture:
    """Returns what transformers knows of the weights of a base.

    Raises:
        ModelError: if transformers knows no causal language model of its config.
    """
    from transformers.pytorch_utils import Conv1D

    model = meta_model(base)
    modules = dict(model.named_modules())
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in modules.items()}
    return Architecture(
        name=type(model).__name__,
        weights=frozenset(model.state_dict()),
        transposed=frozenset(f"{name}.weight" for name, module in modules.items() if isinstance(module, Conv1D)),
        ends=(names.get(id(first), ""), names.get(id(last), "")),
        is_tied=last is not None and last.weight is first.weight,
        vocab_size=int(model.config.get_text_config().vocab_size),
    )


def meta_model(base: Path) -> Any:
    """Returns a base's model without values.

    Raises:
        ModelError: if transformers knows no causal language model of its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = "a causal language model that the installed transformers knows"
        raise ModelError(f"{base / 'config.json'}: expected {wanted} ({first}).") from None
