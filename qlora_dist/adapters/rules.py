"""From a merge config to the rule that makes one module's update out of its parts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qlora_dist.adapters import methods
from qlora_dist.adapters.algebra import Core, Stack, compress, concat
from qlora_dist.config.merge import MergeConfig, MergeMethod
from qlora_dist.errors import bad_value
from qlora_dist.model.peft_folder import Factors


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What a merge says of one module.

    `weights` are what each part counted here, `ranks` the parts' own ranks, `products_PP` their inner products,
    `sigma_S` the singular values of the result before it was cut to `lora_rank`.
    """

    lora_rank: int
    weights: list[float]
    ranks: list[int]
    products_PP: torch.Tensor
    sigma_S: torch.Tensor

    @property
    def energy(self) -> float:
        """Returns ‖ΔW‖² before the cut."""
        return float(self.sigma_S.square().sum())

    @property
    def kept_energy(self) -> float:
        """Returns ‖ΔW‖² after the cut."""
        return float(self.sigma_S[: self.lora_rank].square().sum())


Rule = Callable[[str, Sequence[Factors]], tuple[Factors, ModuleFacts]]
_CORE_METHODS = frozenset({MergeMethod.ties, MergeMethod.dare, MergeMethod.tsv, MergeMethod.iso})


def merge_rule(
    config: MergeConfig, weights: Sequence[float], by_module: Mapping[str, Sequence[float]] | None = None
) -> Rule:
    """Returns the function that merges the parts of one module, given its name; pure, and the same on any thread.

    Args:
        config: method, bounds and scale.
        weights: of each part.
        by_module: of each part in a module, in place of `weights`.

    Raises:
        ConfigError: if the scale isn't finite.
    """
    if not math.isfinite(config.scale):
        raise bad_value("merge.scale", config.scale, "a finite number")

    def rule(module: str, parts: Sequence[Factors]) -> tuple[Factors, ModuleFacts]:
        stack, counts = Stack(parts), list((by_module or {}).get(module, weights))
        if config.method in _CORE_METHODS:
            core = Core(stack)
            merged_KL = config.scale * merge_core(config, core.blocks_PKL, counts, module)
            factors, sigma_S = core.lift(merged_KL, config.rank, config.energy)
        else:
            factors, sigma_S = _merge_factors(config, stack, counts)
        return factors, ModuleFacts(factors.rank, counts, [p.rank for p in parts], stack.inner_products(), sigma_S)

    return rule


def merge_core(config: MergeConfig, blocks_PKL: torch.Tensor, weights: Sequence[float], module: str) -> torch.Tensor:
    """Returns the merged core by a method that needs the parts' cores alone, before the scale."""
    match config.method:
        case MergeMethod.ties:
            return methods.ties(blocks_PKL, weights, config.density)
        case MergeMethod.dare:
            draw = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {module}".encode()))
            return methods.dare(blocks_PKL, weights, config.drop, draw)
        case MergeMethod.tsv:
            return methods.tsv(blocks_PKL, weights)
        case _:
            assert config.method is MergeMethod.iso, config.method
            return methods.iso(blocks_PKL, weights)


def _merge_factors(config: MergeConfig, stack: Stack, weights: Sequence[float]) -> tuple[Factors, torch.Tensor]:
    coefficients = [config.scale * w for w in weights]
    if config.method is MergeMethod.svd:
        return stack.best(coefficients, config.rank, config.energy)
    if config.method is MergeMethod.concat:
        return concat(stack.parts, coefficients), stack.singular_values(coefficients)
    if config.method is MergeMethod.linear_ab:
        whole = methods.linear_ab(stack.parts, weights)
    else:
        assert config.method is MergeMethod.knots_ties, config.method
        whole = methods.knots_ties(Core(stack), weights, config.density)
    whole = Factors(whole.A_RI, whole.B_OR * config.scale)
    cut, sigma_S = compress(whole, config.rank, config.energy)
    return (cut if config.rank or config.energy else whole), sigma_S
