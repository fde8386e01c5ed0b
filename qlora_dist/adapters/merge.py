"""Merging: module by module from the parts' files into one PEFT folder (stage `merged`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qlora_dist.adapters import algebra
from qlora_dist.adapters.collect import open_adapters, shares
from qlora_dist.config.stages import MergedConfig
from qlora_dist.model.adapter import write_provenance
from qlora_dist.model.peft_folder import Factors, PeftFolder, PeftWriter
from qlora_dist.runtime import Facts, write_json

MERGE_FILE = "merge.json"
"""Says, beside the merged adapter, which parts it is made of, with which coefficients and ranks."""


def merge_adapters(config: MergedConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes one PEFT folder made out of the adapters in `inputs`, and what it is made of in `merge.json`.

    Raises:
        ModelError: if an adapter can't be merged, or two don't fit together, naming why.
        ConfigError: if the weights can't be worked out.
    """
    with open_adapters(inputs) as adapters:
        weights = shares(adapters, config.merge.weights, config.shard_weights)
        coefficients = [config.merge.scale * weights[a.label] for a in adapters]
        products_PP = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)

        def combine(module: str, parts: list[Factors]) -> Factors:
            nonlocal products_PP
            products_PP = products_PP + algebra.inner_products(parts)
            return algebra.concat(parts, coefficients)

        merge_modules(adapters, out, combine)
        facts = describe(adapters, weights, config.merge.scale, products_PP)
        write_json(out / MERGE_FILE, {"method": config.merge.method.name, **facts})
        _write_joint_provenance(adapters, out)
    return facts


def merge_modules(adapters: Sequence[PeftFolder], out: Path, combine: Callable[[str, list[Factors]], Factors]) -> None:
    """Writes what `combine` makes of each module's factors; memory holds one module at a time."""
    saved = [(a, key) for a in adapters for key in a.saved_modules]
    with PeftWriter(out, adapters[0], [key for _, key in saved]) as writer:
        for module, parts in _modules(adapters):
            writer.add(module, combine(module, parts))
        for adapter, key in saved:
            writer.add_saved(key, adapter.file.read(key))


def _modules(adapters: Sequence[PeftFolder]) -> Iterator[tuple[str, list[Factors]]]:
    for module in adapters[0].modules:
        yield module, [a.factors(module) for a in adapters]


def describe(
    adapters: Sequence[PeftFolder], weights: Mapping[str, float], scale: float, products_PP: torch.Tensor
) -> Facts:
    """Returns the parts with weights, ranks and norms, their cosines, and how much they add up or cancel.

    `cross_energy` is (‖Σ cᵢΔWᵢ‖² − Σ ‖cᵢΔWᵢ‖²) / Σ ‖cᵢΔWᵢ‖²: 0 for orthogonal parts, negative where they cancel.
    """
    norms = products_PP.diagonal().clamp(min=0).sqrt()
    cosines = products_PP / torch.outer(norms, norms).clamp(min=torch.finfo(torch.float64).tiny)
    c_P = torch.tensor([scale * weights[a.label] for a in adapters], dtype=torch.float64)
    whole, apart = float(c_P @ products_PP @ c_P), float((c_P * norms).square().sum())
    parts = [
        {
            "label": a.label,
            "weight": weights[a.label],
            "lora_rank": max(a.rank(module) for module in a.modules),
            "norm": float(norm),
            "trained_tokens": a.provenance.trained_tokens if a.provenance else None,
        }
        for a, norm in zip(adapters, norms, strict=True)
    ]
    return {
        "parts": parts,
        "scale": scale,
        "norm": max(whole, 0.0) ** 0.5,
        "cosines": [[round(float(x), 6) for x in row] for row in cosines],
        "cross_energy": (whole - apart) / apart if apart else 0.0,
        "num_modules": len(adapters[0].modules),
        "lora_rank": max(sum(a.rank(module) for a in adapters) for module in adapters[0].modules),
    }


def _write_joint_provenance(adapters: Sequence[PeftFolder], out: Path) -> None:
    known = [a.provenance for a in adapters if a.provenance is not None]
    if len(known) == len(adapters):
        tokens = sum(p.trained_tokens for p in known)
        write_provenance(out, replace(known[0], trained_tokens=tokens))
