"""A merge that is divided over nodes: each makes a range of the modules, and the last one writes them to one folder.

A module's update and its facts travel in `modules.safetensors` as the merge made them, so that the joined folder has
the bytes of the undivided one. A range is no PEFT folder, so that nobody takes it for an adapter.

Letters: P adapters, S singular values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qlora_dist.adapters.collect import open_adapters, shares
from qlora_dist.adapters.rules import ModuleFacts, merge_rule
from qlora_dist.adapters.streaming import merge_in_order
from qlora_dist.config.stages import MergedPartConfig
from qlora_dist.model.peft_folder import Factors, PeftFolder
from qlora_dist.model.tensorfile import TensorFile, TensorWriter
from qlora_dist.model.weights import read_json
from qlora_dist.runtime import Facts, Progress, write_json

MODULES_FILE, FACTS_FILE = "modules.safetensors", "modules.json"
_TENSORS = ("A", "B", "products", "sigma")


def merge_part(config: MergedPartConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Merges one range of the modules of the adapters in `inputs`.

    Raises:
        ModelError: if an adapter can't be merged, or two don't fit together, naming why.
        ConfigError: if the weights can't be worked out.
    """
    with open_adapters(inputs) as adapters:
        weights = shares(adapters, config.merge.weights, config.shard_weights)
        rule = merge_rule(config.merge, list(weights.values()))
        modules = modules_of_part(adapters[0], config.part, config.num_parts)
        merged = merge_in_order(adapters, rule, config.merge.workers, modules)
        told, progress = {}, Progress(len(modules), "module")
        with TensorWriter(out / MODULES_FILE, [f"{m}.{kind}" for m in modules for kind in _TENSORS]) as file:
            for module, (factors, facts) in merged:
                tensors = (factors.A_RI, factors.B_OR, facts.products_PP, facts.sigma_S)
                for kind, tensor in zip(_TENSORS, tensors, strict=True):
                    file.add(f"{module}.{kind}", tensor)
                told[module] = {"weights": facts.weights, "ranks": facts.ranks}
                progress.update(len(told))
    write_json(out / FACTS_FILE, told)
    return {"part": config.part, "num_parts": config.num_parts, "num_modules": len(told)}


def modules_of_part(adapter: PeftFolder, part: int, num_parts: int) -> list[str]:
    """Returns the modules of one of several ranges, which have about as many values each."""
    sizes = [sum(adapter.shape(module)) for module in adapter.modules]
    total, before, found = sum(sizes), 0, []
    for module, size in zip(adapter.modules, sizes, strict=True):
        if (2 * before + size) * num_parts // (2 * total) == part:  # where the module's middle falls
            found.append(module)
        before += size
    return found


def read_merged(folders: Sequence[Path]) -> Iterator[tuple[str, tuple[Factors, ModuleFacts]]]:
    """Yields the modules of all ranges in order, each as the merge made it."""
    for folder in folders:
        told = read_json(folder / FACTS_FILE, "a part of a merge holds it")
        with TensorFile(folder / MODULES_FILE) as file:
            for module, facts in told.items():
                A_RI, B_OR, products_PP, sigma_S = (file.read(f"{module}.{kind}") for kind in _TENSORS)
                merged = ModuleFacts(len(A_RI), facts["weights"], facts["ranks"], products_PP, sigma_S)
                yield module, (Factors(A_RI, B_OR), merged)
