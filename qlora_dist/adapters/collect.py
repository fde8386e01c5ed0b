"""Which adapters are merged, whether they fit together, and how much each one counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qlora_dist.config.merge import MergeWeights
from qlora_dist.errors import ModelError, bad_value
from qlora_dist.model.peft_folder import CONFIG_FILE, PeftFolder

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
        check_saved_modules(adapters)
        yield adapters


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
    return {BASE_PATH: path or "", "revision": revision or ""}


def _differ(first: PeftFolder, other: PeftFolder, what: str, mine: str, theirs: str) -> ModelError:
    shown = f"{first.label} has {mine[:80]}, {other.label} has {theirs[:80]} ({other.path})"
    repair = f" If it is one base, write the same {BASE_PATH} into both {CONFIG_FILE}." if what == BASE_PATH else ""
    return ModelError(f"{first.label} and {other.label} can't be merged: another {what}: {shown}.{repair}")


def check_saved_modules(adapters: Sequence[PeftFolder]) -> None:
    """Checks that at most one adapter brings whole layers of its own, since those can't be summed.

    Raises:
        ModelError: naming the adapters and a layer.
    """
    owners = [a for a in adapters if a.saved_modules]
    if len(owners) > 1:
        names = ", ".join(a.label for a in owners)
        raise ModelError(
            f"{names} each bring whole layers (modules_to_save, {owners[0].saved_modules[0]}): at most one may."
        )


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
    return shard_weights[adapter.label]


def _count(adapter: PeftFolder, weights: MergeWeights) -> float:
    match weights:
        case MergeWeights.tokens:
            found, what = float(adapter.provenance.trained_tokens if adapter.provenance else 0), "how many tokens"
        case MergeWeights.inverse_loss:
            loss = adapter.provenance.validation_loss if adapter.provenance else None
            found, what = 1 / (loss or float("inf")), "with what validation_loss"
        case _:
            return 1.0
    if found <= 0:
        wanted = f"adapters that say {what} they were trained; {adapter.label} ({adapter.path}) doesn't"
        raise bad_value("merge.weights", weights.name, wanted, "Set merge.weights=uniform.")
    return found
