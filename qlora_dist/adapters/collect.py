"""Which adapters are merged, whether they fit together, and how much each one counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from qlora_dist.config.merge import MergeWeights
from qlora_dist.errors import ModelError, bad_value
from qlora_dist.model.peft_folder import CONFIG_FILE, PeftFolder, vocabulary
from qlora_dist.runtime import log

BASE_PATH = "base_model_name_or_path"


@contextmanager
def open_adapters(folders: Mapping[str, Path]) -> Iterator[list[PeftFolder]]:
    """Opens adapters by label, checks that they fit together, and closes them at the end of the block.

    Raises:
        ModelError: if one can't be merged, or two don't fit, naming the difference.
    """
    if not folders:
        raise ModelError("Nothing to merge: no adapter was given.")
    with ExitStack() as stack:
        adapters = [stack.enter_context(PeftFolder(path, label)) for label, path in folders.items()]
        for other in adapters[1:]:
            check_fit(adapters[0], other)
        check_tokenizers(adapters)
        check_saved_modules(adapters)
        base_copies(adapters)
        warn_of_unnamed_bases(adapters)
        yield adapters


def warn_of_unnamed_bases(adapters: Sequence[PeftFolder]) -> None:
    """Says which adapters name no base, so that nothing but their shapes says that they fit the others."""
    unnamed = [a.label for a in adapters if not any(_identity(a, a.provenance is not None).values())]
    if unnamed and len(adapters) > 1:
        log.warning("%s: no %s; that the base is one is told by the shapes alone.", ", ".join(unnamed), BASE_PATH)


def check_fit(first: PeftFolder, other: PeftFolder) -> None:
    """Checks that two adapters are of one base, one tokenizer and the same layers.

    Raises:
        ModelError: naming what differs, and both values.
    """
    by_content = first.provenance is not None and other.provenance is not None
    ours, theirs = _identity(first, by_content), _identity(other, by_content)
    for name, mine in ours.items():
        if mine and theirs[name] and mine != theirs[name]:
            raise _differ(first, other, name, mine, theirs[name])
    missing = sorted(set(first.modules) ^ set(other.modules))
    if missing:
        owner, lacks = (first, other) if missing[0] in first.modules else (other, first)
        found = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
        raise ModelError(f"{owner.label} adapts {found}, {lacks.label} doesn't: expected the same target_modules.")
    for module in first.modules:
        if first.shape(module) != other.shape(module):
            raise _differ(first, other, f"shape of {module}", str(first.shape(module)), str(other.shape(module)))


def _identity(adapter: PeftFolder, by_content: bool) -> dict[str, str]:
    """Returns what an adapter says of its base: by content where both do, else by name."""
    known = adapter.provenance
    if known is not None and by_content:
        return {"base": known.base_digest, "tokenizer": known.tokenizer_digest}
    path, revision = adapter.config.get("base_model_name_or_path"), adapter.config.get("revision")
    if known is not None:
        path, revision = known.base_path, known.base_revision
    return {BASE_PATH: (path or "").rstrip("/"), "revision": revision or ""}


def _differ(first: PeftFolder, other: PeftFolder, what: str, mine: str, theirs: str) -> ModelError:
    shown = f"{first.label} has {mine[:80]}, {other.label} has {theirs[:80]} ({other.path})"
    repair = f" If it is one base, write the same {BASE_PATH} into both {CONFIG_FILE}." if what == BASE_PATH else ""
    return ModelError(f"{first.label} and {other.label} can't be merged: another {what}: {shown}.{repair}")


def check_tokenizers(adapters: Sequence[PeftFolder]) -> None:
    """Checks that the tokenizers that lie beside adapters number tokens alike.

    Raises:
        ModelError: naming two that don't.
    """
    known = [(a, found) for a in adapters if (found := vocabulary(a.path)) is not None]
    for other, found in known[1:]:
        if found != known[0][1]:
            first = known[0][0]
            shown = f"{first.path / 'tokenizer.json'} and {other.path / 'tokenizer.json'} number tokens otherwise"
            raise ModelError(f"{first.label} and {other.label} can't be merged: another tokenizer: {shown}.")


def check_saved_modules(adapters: Sequence[PeftFolder]) -> None:
    """Checks that at most one adapter brings whole layers of its own, since those can't be summed; equal ones are one.

    Raises:
        ModelError: naming the adapters and a layer.
    """
    owners = [a for a in adapters if a.saved_modules]
    for other in owners[1:]:
        theirs, ours = set(other.saved_modules), set(owners[0].saved_modules)
        unequal = sorted(theirs ^ ours) or [k for k in other.saved_modules if not _same(owners[0], other, k)]
        if unequal:
            names = ", ".join(a.label for a in owners)
            raise ModelError(f"{names} each bring whole layers (modules_to_save, {unequal[0]}): at most one may.")


def base_copies(adapters: Sequence[PeftFolder]) -> dict[str, PeftFolder]:
    """Returns whose copy of each of the base's weights a merge carries along, by the weight's name.

    Raises:
        ModelError: if two adapters were saved with different copies.
    """
    found: dict[str, PeftFolder] = {}
    for adapter in adapters:
        for name, key in adapter.base_copies.items():
            first = found.setdefault(name, adapter)
            if first is not adapter and not _same(first, adapter, key, narrowed=True):
                shown = f"the copies of {name} that were saved with them differ ({first.path}, {adapter.path})"
                raise ModelError(f"{first.label} and {adapter.label} can't be merged: another base: {shown}.")
    return found


def _same(first: PeftFolder, other: PeftFolder, key: str, *, narrowed: bool = False) -> bool:
    """Says that two adapters hold one tensor; `narrowed` lets one have rounded what the other has whole."""
    mine, theirs = first.file.read(key), other.file.read(key)
    if narrowed:
        dtype = min(mine.dtype, theirs.dtype, key=lambda one: one.itemsize)
        mine, theirs = mine.to(dtype), theirs.to(dtype)
    return mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def shares(
    adapters: Sequence[PeftFolder], weights: MergeWeights, shard_weights: Mapping[str, float]
) -> dict[str, float]:
    """Returns each adapter's share of the merge by label; they sum to one, but for `given`, taken as they are.

    Args:
        adapters: the parts.
        weights: what a share is proportional to.
        shard_weights: a factor by label (1 for a label that isn't named), or with `given` the share itself.

    Raises:
        ConfigError: if an adapter doesn't say what its share depends on.
    """
    if weights is MergeWeights.given:
        return {a.label: _given(a, shard_weights) for a in adapters}
    counts = {a.label: shard_weights.get(a.label, 1.0) * _count(a, weights) for a in adapters}
    total = sum(counts.values())
    return {label: count / total for label, count in counts.items()}


def _given(adapter: PeftFolder, shard_weights: Mapping[str, float]) -> float:
    if adapter.label not in shard_weights:
        raise bad_value("merge.weights", "given", f"a weight for each adapter; {adapter.label} has none")
    if not math.isfinite(weight := shard_weights[adapter.label]):
        raise bad_value("merge.weights", weight, f"finite numbers; {adapter.label} has {weight}")
    return weight


def _count(adapter: PeftFolder, weights: MergeWeights) -> float:
    match weights:
        case MergeWeights.tokens:
            found, what = float(adapter.provenance.trained_tokens if adapter.provenance else 0), "how many tokens"
        case MergeWeights.inverse_loss:
            loss = adapter.provenance.validation_loss if adapter.provenance else None
            found, what = 1 / (loss or float("inf")), "with what validation_loss"
        case _:
            return 1.0
    if not (math.isfinite(found) and found > 0):
        wanted = f"adapters that say {what} they were trained; {adapter.label} ({adapter.path}) doesn't"
        raise bad_value("merge.weights", weights.name, wanted, "Set merge.weights=uniform.")
    return found
