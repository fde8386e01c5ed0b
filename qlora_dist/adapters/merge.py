"""Stage `merged`, and `python -m qlora_dist.adapters.merge`, which does the same for any PEFT folders.

Torch is imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_dist.config.merge import CALIBRATED, MergeConfig, MergeMethod
from qlora_dist.config.stages import MergedConfig, RoundsConfig
from qlora_dist.runtime import Facts, write_json

if TYPE_CHECKING:
    from qlora_dist.model.peft_folder import PeftFolder

BASE, ROWS, PART = "base", "rows-", "merged_part-"
"""The inputs of a merge that are no adapters: the base, the rows of each label, and finished ranges of modules."""
MERGE_FILE = "merge.json"
"""Says, beside the merged adapter, which parts it is made of, with which weights and ranks."""


def merge_adapters(config: MergedConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes one PEFT folder made out of the adapters in `inputs`, and what it is made of in `merge.json`.

    Raises:
        ModelError: if an adapter can't be merged, or two don't fit together, naming why.
        ConfigError: if the weights can't be worked out.
    """
    if config.rounds is not None:
        return merge_rounds(config.rounds, inputs, out)
    adapters = adapter_inputs(inputs)
    return merge_folders(config, adapters, {name: p for name, p in inputs.items() if name not in adapters}, out)


def merge_folders(config: MergedConfig, folders: Mapping[str, Path], others: Mapping[str, Path], out: Path) -> Facts:
    """Merges as `merge_adapters` does, with the adapters told apart from the rest, so that any label will do.

    Args:
        config: the stage's.
        folders: the adapters by label.
        others: the base, the rows of each label and finished ranges of modules, by the names of the stage's inputs.
        out: an empty folder.
    """
    from qlora_dist.adapters.collect import open_adapters, shares
    from qlora_dist.adapters.describe import describe
    from qlora_dist.adapters.parts import read_merged
    from qlora_dist.adapters.rules import merge_rule
    from qlora_dist.adapters.streaming import merge_in_order, write_modules

    with open_adapters(folders) as opened:
        weights = shares(opened, config.merge.weights, config.shard_weights)
        rule = merge_rule(config.merge, list(weights.values()))
        if config.merge.method in CALIBRATED:
            from qlora_dist.adapters.calibrated import calibrated_rule

            rule, found = calibrated_rule(config, opened, list(weights.values()), others)
            weights = dict(zip(weights, found, strict=True))
        if config.merge.method is MergeMethod.greedy_soup:
            weights = {label: weight for label, weight in weights.items() if weight}
            rule = merge_rule(replace(config.merge, method=_exact(config.merge)), list(weights.values()))
        adapters = [adapter for adapter in opened if adapter.label in weights]
        parts = [path for name, path in others.items() if name.startswith(PART)]
        merged = read_merged(parts) if parts else merge_in_order(adapters, rule, config.merge.workers)
        modules = write_modules(adapters, merged, out)
        told = {"method": config.merge.method.name, "weights": config.merge.weights.name}
        facts = told | describe(adapters, weights, config.merge.scale, modules)
        write_json(out / MERGE_FILE, facts)
        write_joint_provenance(adapters, out)
    return {name: value for name, value in facts.items() if name != "modules"}


def merge_rounds(config: RoundsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes what workers that were averaged in rounds come to, and who took part in `merge.json`."""
    from qlora_dist.adapters.outer import average_last_round

    facts = average_last_round(config, inputs, out)
    write_json(out / MERGE_FILE, facts)
    return facts


def _exact(merge: MergeConfig) -> MergeMethod:
    return MergeMethod.svd if merge.rank or merge.energy else MergeMethod.concat


def adapter_inputs(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """Returns the adapters among the inputs of a merge: all but what it is calibrated on, and its finished parts."""
    return {label: path for label, path in inputs.items() if label != BASE and not label.startswith((ROWS, PART))}


def write_joint_provenance(adapters: Sequence[PeftFolder], out: Path) -> None:
    """Says beside the merged adapter what its parts were trained on, if each of them says so."""
    from qlora_dist.model.adapter import write_provenance

    known = [a.provenance for a in adapters if a.provenance is not None]
    if len(known) == len(adapters):
        tokens = sum(p.trained_tokens for p in known)
        write_provenance(out, replace(known[0], trained_tokens=tokens, validation_loss=None))


if __name__ == "__main__":
    from qlora_dist.adapters.command import main

    sys.exit(main())
