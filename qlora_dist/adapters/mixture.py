"""Several adapters on one base at once: what `regmean` needs to see of the inputs, and `learned` of the loss.

Letters: X any leading dimensions, I inputs and O outputs of a layer, P adapters, M modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora_dist.errors import ModelError
from qlora_dist.model.peft_folder import Factors, PeftFolder

Parts = Mapping[str, Sequence[Factors]]
"""Each module's factors, one of each adapter, in the same order."""


def read_parts(adapters: Sequence[PeftFolder]) -> dict[str, list[Factors]]:
    """Reads all factors into memory; meant for one base on one machine, where they are small beside it."""
    return {module: [a.factors(module) for a in adapters] for module in adapters[0].modules}


@contextmanager
def mixture(model: torch.nn.Module, parts: Parts, weights: torch.Tensor) -> Iterator[None]:
    """Adds Σ wᵢ Bᵢ Aᵢ x to each adapted layer inside the block, differentiably in the weights.

    The base's weights aren't touched, so it may be quantized.

    Args:
        model: the base.
        parts: the updates.
        weights: [P], or [M, P] for weights of each module, in the order of `parts`.

    Raises:
        ModelError: if the base has no layer of a module's name.
    """
    layers = dict(model.named_modules())
    hooks = []
    try:
        for row, (module, factors) in enumerate(parts.items()):
            if module not in layers:
                raise ModelError(f"The base has no layer {module}, which the adapters adapt. It is another base.")
            weights_P = weights if weights.ndim == 1 else weights[row]
            hooks.append(layers[module].register_forward_hook(_adder(factors, weights_P)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adder(factors: Sequence[Factors], weights_P: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out_XO: torch.Tensor) -> torch.Tensor:
        x_XI = inputs[0].float()
        terms = ((x_XI @ f.A_RI.to(x_XI).T) @ f.B_OR.to(x_XI).T for f in factors)
        added = torch.stack([w * term for w, term in zip(weights_P.to(x_XI.device), terms, strict=True)]).sum(0)
        return out_XO + added.to(out_XO.dtype)

    return hook


@torch.no_grad()
def collect_grams(
    model: torch.nn.Module,
    parts: Parts,
    adapter: int,
    batches: Iterable[Mapping[str, torch.Tensor]],
    modules: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the mean of x xᵀ over the tokens that reach each layer of base + one adapter, in float32.

    Layers that share their input (q, k, v; gate, up) each get a matrix of their own, I² values: for a large base,
    collect a few modules at a time by `modules`.

    Args:
        model: the base.
        parts: the updates of all adapters.
        adapter: which of them is on.
        batches: keyword arguments of the model; `kept` [B, T], where it is given, says which slots count.
        modules: which layers; None is all.
    """
    wanted = list(parts) if modules is None else list(modules)
    sums: dict[str, torch.Tensor] = {}
    kept: torch.Tensor | None = None
    num_tokens = 0
    layers = dict(model.named_modules())

    def watch(module: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_NI = inputs[0].float().flatten(0, -2) if kept is None else inputs[0].float()[kept]
            sums[module] = sums.get(module, torch.zeros(())) + (x_NI.T @ x_NI).cpu()

        return hook

    alone = {module: [factors[adapter]] for module, factors in parts.items()}
    hooks = [layers[module].register_forward_pre_hook(watch(module)) for module in wanted]
    try:
        with mixture(model, alone, torch.ones(1)):
            for batch in batches:
                fields: dict[str, Any] = dict(batch)
                kept = fields.pop("kept", None)
                num_tokens += int(kept.sum()) if kept is not None else fields["input_ids"].numel()
                model(**fields)
    finally:
        for hook in hooks:
            hook.remove()
    if not num_tokens:
        raise ModelError("Gram matrices need at least one token to be collected on.")
    return {module: total / num_tokens for module, total in sums.items()}
