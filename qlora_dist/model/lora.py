"""Putting LoRA factors on a base, and counting what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qlora_dist.errors import ModelError, bad_value, nearest
from qlora_dist.model.quantize import linear4bit_modules
from qlora_dist.runtime import log

if TYPE_CHECKING:
    from qlora_dist.config.train import LoraConfig

DRAWS = ("drop", "jitter")
"""Parts of the names by which models call the shares that they drop or blur at random while they train."""


def peft_config(lora: LoraConfig, targets: Sequence[str]) -> Any:
    """Returns PEFT's config of an adapter of the modules named."""
    import peft

    return peft.LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=sorted(targets),
        use_rslora=lora.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach_lora(model: Any, lora: LoraConfig) -> Any:
    """Returns the model with fresh float32 LoRA factors, drawn from torch's current seed, and no dropout of its own.

    Raises:
        ConfigError: if `lora.target_modules` names a layer that the model has not, or its head.
        ModelError: if the model's layers, or some that are to be adapted, are of a kind that can't be.
    """
    import peft

    refuse_transposed(model)
    _still(model)
    return peft.get_peft_model(model, peft_config(lora, _targets(model, lora)))


def refuse_transposed(model: Any) -> None:
    """Refuses a model whose layers hold their weights the other way round, as GPT-2's do.

    Raises:
        ModelError: naming the architecture, and which ones are supported.
    """
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        found = f"{type(model).__name__}: its layers are Conv1D, with weights the other way round"
        repair = "Set model.path to one of torch's linear layers (llama, qwen3, mistral, gemma3, phi3, gpt_neox ...)"
        raise ModelError(f"{found}: expected linear ones. {repair}, or train.method=full and model.quantization=none.")


def _targets(model: Any, lora: LoraConfig) -> Sequence[str]:
    """Returns what is adapted: as asked, by default each linear layer of the decoder.

    Full names are told where a short one would mean layers outside of the decoder too (of an image tower).
    """
    leaves = _linear_leaves(model)
    decoder = model.get_decoder()
    own = {id(module) for module in decoder.modules()}
    linear = {name: module for name, module in leaves.items() if id(module) in own}
    kept = _kept_modules(model, {_leaf(name) for name in linear})
    _check_names(model, lora.target_modules, kept)
    found = [n for n in linear if _leaf(n) in (lora.target_modules or kept)]
    _refuse_dense(model, found)
    if not lora.target_modules and (experts := {_leaf(n) for n in linear} - kept):
        log.info("lora.target_modules: without %s, which PEFT takes for experts' weights", ", ".join(sorted(experts)))
    outside = any(_leaf(n) in lora.target_modules for n in leaves if n not in linear)
    return found if outside or not lora.target_modules else lora.target_modules


def _linear_leaves(model: Any) -> dict[str, Any]:
    """Returns the linear layers by name, the head left out."""
    from torch import nn

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _check_names(model: Any, names: Iterable[str], valid: set[str]) -> None:
    """Refuses a name that is no linear layer of the decoder."""
    head = model.get_output_embeddings()
    heads = {_leaf(name) for name, module in model.named_modules() if module is head}
    for name in names:
        if name in heads - valid:
            wanted = "linear layers of the decoder: the head stays as it is, and its loss is computed in chunks"
            raise bad_value("lora.target_modules", name, wanted)
        if name not in valid:
            raise bad_value("lora.target_modules", name, "a linear layer of the base", nearest(name, valid))


def _kept_modules(model: Any, leaves: Iterable[str]) -> set[str]:
    """Returns the names that PEFT takes for modules: in some mixtures of experts others mean the experts' tensors."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    kept = set()
    for name in leaves:
        config = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it wants the names of all that is fused into one tensor
            continue
        if not config.target_parameters:
            kept.add(name)
    return kept


def _refuse_dense(model: Any, names: Iterable[str]) -> None:
    """Refuses to adapt what bitsandbytes left in 16 bits: a layer of a class of its own, or one it was told to skip."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    packed = {name for name, _ in linear4bit_modules(model)}
    dense = sorted({_leaf(name) for name in names if name not in packed})
    if dense:
        repair = "Set model.quantization=none, or name others in lora.target_modules"
        raise ModelError(f"{type(model).__name__}: bitsandbytes left {', '.join(dense)} in 16 bits. {repair}.")


def _still(model: Any) -> None:
    """Turns off what a base would draw at random while it trains: the recipe's dropout is `lora.lora_dropout`.

    Its own masks would be other ones after a kill, and beside other lanes.
    """
    from torch.nn.modules.dropout import _DropoutNd

    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    found = {}
    for owner in (*model.modules(), *configs.values()):
        for name, value in list(vars(owner).items()):
            draws = any(part in name for part in DRAWS) or (name == "p" and isinstance(owner, _DropoutNd))
            if draws and isinstance(value, float) and value > 0:
                setattr(owner, name, 0.0)
                found["dropout" if name == "p" else name] = value
    if found:
        told = ", ".join(f"{name}={value:g}" for name, value in sorted(found.items()))
        log.info("the base's own %s is off while adapters train: lora.lora_dropout is the recipe's", told)


def num_trainable(model: Any) -> int:
    """Returns the number of values that an optimizer step changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
