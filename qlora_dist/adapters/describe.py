"""What a merge says of itself: parts with weights, their cosines, how they add up or cancel, and what a cut kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qlora_dist.adapters.rules import ModuleFacts
from qlora_dist.model.peft_folder import PeftFolder
from qlora_dist.runtime import Facts


def describe(
    adapters: Sequence[PeftFolder], weights: Mapping[str, float], scale: float, modules: Mapping[str, ModuleFacts]
) -> Facts:
    """Returns the facts of a merge: `parts`, `cosines`, `cross_energy`, `spectrum`, `energy_kept`, ranks, norms.

    `cross_energy` is (‖Σ wᵢΔWᵢ‖² − Σ ‖wᵢΔWᵢ‖²) / Σ ‖wᵢΔWᵢ‖²: 0 for orthogonal parts, negative where they cancel.
    `spectrum` is the share of ‖ΔW‖² of the 1st, 2nd … singular value, over all modules.
    """
    products_PP = torch.stack([m.products_PP for m in modules.values()]).sum(0)
    norms_P = products_PP.diagonal().clamp(min=0).sqrt()
    whole, apart = (sum(energies) for energies in zip(*map(_energies, modules.values()), strict=True))
    energy = sum(m.energy for m in modules.values())
    return {
        "parts": [_part(a, weights[a.label], float(norm)) for a, norm in zip(adapters, norms_P, strict=True)],
        "scale": scale,
        "whole_layers_of": next((a.label for a in adapters if a.saved_modules), None),
        "cosines": _rounded(products_PP / torch.outer(norms_P, norms_P).clamp(min=1e-300)),
        "cross_energy": (whole - apart) / apart if apart else 0.0,
        "norm": sum(m.kept_energy for m in modules.values()) ** 0.5,
        "energy_kept": sum(m.kept_energy for m in modules.values()) / energy if energy else 1.0,
        "spectrum": _spectrum(list(modules.values()), energy),
        "num_modules": len(modules),
        "lora_rank": max(m.lora_rank for m in modules.values()),
        "largest_rank": max(sum(m.ranks) for m in modules.values()),
        "modules": {name: _module(m, list(weights.values())) for name, m in modules.items()},
    }


def _energies(module: ModuleFacts) -> tuple[float, float]:
    """Returns ‖Σ wᵢΔWᵢ‖² and Σ ‖wᵢΔWᵢ‖² of one module."""
    w_P = torch.tensor(module.weights, dtype=torch.float64)
    return float(w_P @ module.products_PP @ w_P), float((w_P.square() * module.products_PP.diagonal()).sum())


def _part(adapter: PeftFolder, weight: float, norm: float) -> Facts:
    return {
        "label": adapter.label,
        "weight": weight,
        "norm": norm,
        "lora_rank": max(adapter.rank(module) for module in adapter.modules),
        "trained_tokens": adapter.provenance.trained_tokens if adapter.provenance else None,
    }


def _module(module: ModuleFacts, weights: Sequence[float]) -> Facts:
    kept = module.kept_energy / module.energy if module.energy else 1.0
    own = {} if module.weights == weights else {"weights": module.weights}
    return own | {
        "lora_rank": module.lora_rank,
        "ranks": module.ranks,
        "norm": module.kept_energy**0.5,
        "energy_kept": kept,
    }


def _spectrum(modules: Sequence[ModuleFacts], energy: float) -> list[float]:
    longest = max(len(m.sigma_S) for m in modules)
    total_S = torch.zeros(longest, dtype=torch.float64)
    for module in modules:
        total_S[: len(module.sigma_S)] += module.sigma_S.square()
    return [round(float(x), 9) for x in total_S / energy] if energy else []


def _rounded(matrix_PP: torch.Tensor) -> list[list[float]]:
    return [[round(float(x), 6) for x in row] for row in matrix_PP]
