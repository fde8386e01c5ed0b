"""Merges that look at data: RegMean at the layers' inputs, learned weights and soups at the loss, on rows of the parts.

Inputs, besides the adapters by label: `base`, and for each label `rows-<label>`, packed rows that aren't held out
for the final scores.

Letters: B rows, T slots of a row, P adapters, W weights: one for each adapter, or for each adapter in each module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from qlora_dist.adapters.algebra import Stack, compress
from qlora_dist.adapters.merge import BASE, ROWS
from qlora_dist.adapters.methods import greedy_soup, learned, regmean
from qlora_dist.adapters.mixture import collect_grams, mixture, read_parts
from qlora_dist.adapters.rules import ModuleFacts, Rule, merge_rule
from qlora_dist.config.merge import LearnedPer, MergeConfig, MergeMethod
from qlora_dist.config.stages import MergedConfig
from qlora_dist.data.rows import Rows, row_order
from qlora_dist.errors import ModelError
from qlora_dist.model.base import load_model, open_base
from qlora_dist.model.peft_folder import Factors, PeftFolder
from qlora_dist.runtime import Progress
from qlora_dist.runtime import device as default_device

_GRAM_BYTES = 2**31  # of all Gram matrices that are held at a time; more modules take another pass over the rows
_ROWS_AT_ONCE = 4


def calibrated_rule(
    config: MergedConfig, adapters: Sequence[PeftFolder], weights: Sequence[float], inputs: Mapping[str, Path]
) -> tuple[Rule, list[float]]:
    """Returns the rule of a merge that looks at data, and the weights that it uses.

    Raises:
        ModelError: if the base, its config or an adapter's rows aren't among what the merge was given.
    """
    missing = [name for name in (BASE, *(ROWS + a.label for a in adapters)) if name not in inputs]
    if missing or config.model is None:
        wanted = "the base and each adapter's rows, as a run gives them"
        raise ModelError(f"method {config.merge.method.name} needs {wanted}; {(missing or ['model'])[0]} isn't there.")
    rows = [Rows.open(inputs[ROWS + a.label]) for a in adapters]
    model = load_model(open_base(inputs[BASE]), config.model).eval().requires_grad_(False)
    if config.merge.method is MergeMethod.regmean:
        return _regmean_rule(config.merge, model, adapters, list(weights), rows), list(weights)
    is_soup = config.merge.method is MergeMethod.greedy_soup
    found = (soup_weights if is_soup else learn_weights)(config.merge, model, adapters, rows)
    exact = MergeMethod.svd if config.merge.rank or config.merge.energy else MergeMethod.concat
    num_parts, modules = len(adapters), adapters[0].modules
    by_module = {m: found[i * num_parts : (i + 1) * num_parts] for i, m in enumerate(modules)}
    if len(found) == num_parts:
        return merge_rule(replace(config.merge, method=exact), found), found
    means = [sum(found[i::num_parts]) / len(modules) for i in range(num_parts)]
    return merge_rule(replace(config.merge, method=exact), means, by_module), means


def learn_weights(
    merge: MergeConfig, model: torch.nn.Module, adapters: Sequence[PeftFolder], rows: Sequence[Rows]
) -> list[float]:
    """Returns the weights with the lowest mean loss over the targets of all parts' rows, found by Adam from their mean.

    There is one for each adapter, or with `learned_per=module` one for each adapter of the first module, then of the
    second, and so on.
    """
    parts = read_parts(adapters)
    shape = (len(parts), len(adapters)) if merge.learned_per is LearnedPer.module else (len(adapters),)
    batches = [batch for part in rows for batch in batches_of(part, merge.calibration_rows, merge.seed)]
    progress, shares = Progress(merge.steps * len(batches), "batch"), target_shares(batches)

    def loss(weights_W: torch.Tensor) -> torch.Tensor:
        value, gradient_W = 0.0, torch.zeros_like(weights_W)
        for batch, share in zip(batches, shares, strict=True):  # one graph at a time: memory is that of one batch
            progress.update(progress.done + 1)
            with mixture(model, parts, weights_W.view(shape)):
                one = completion_loss(model, batch) * share
            gradient_W += torch.autograd.grad(one, weights_W)[0]
            value += float(one.detach())
        return value + ((weights_W - weights_W.detach()) * gradient_W).sum()

    start = 1 / len(adapters)
    return learned(math.prod(shape), loss, steps=merge.steps, learning_rate=merge.learning_rate, start=start)


@torch.no_grad()
def soup_weights(
    merge: MergeConfig, model: torch.nn.Module, adapters: Sequence[PeftFolder], rows: Sequence[Rows]
) -> list[float]:
    """Returns the weights of a greedy soup by the mean loss over the rows' targets: equal in it, 0 for the others."""
    parts = read_parts(adapters)
    batches = [batch for part in rows for batch in batches_of(part, merge.calibration_rows, merge.seed)]
    labels, shares = [adapter.label for adapter in adapters], target_shares(batches)

    def weights_of(chosen: Sequence[str]) -> list[float]:
        return [float(label in chosen) / len(chosen) for label in labels]

    progress = Progress((2 * len(labels) - 1) * len(batches), "batch")

    def score(chosen: Sequence[str]) -> float:
        total = 0.0
        with mixture(model, parts, torch.tensor(weights_of(chosen))):
            for batch, share in zip(batches, shares, strict=True):
                total += float(completion_loss(model, batch)) * share
                progress.update(progress.done + 1)
        return total

    return weights_of(greedy_soup(labels, score))


def completion_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the mean negative log-likelihood of a batch's targets, in nats."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    is_target_BT = batch["trained"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][is_target_BT].float(), batch["input_ids"][:, 1:][is_target_BT]
    )


def target_shares(batches: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
    """Returns each batch's share of all targets: a short batch's mean loss must not weigh as much as a full one's."""
    counts = [int(batch["trained"][:, 1:].sum()) for batch in batches]
    return [count / sum(counts) for count in counts]


def batches_of(rows: Rows, num_rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Returns some rows, drawn by seed, as batches: `input_ids`, `position_ids`, `trained` and `kept` [B, T].

    There is no attention mask on purpose: transformers keeps packed segments apart by positions that start again.
    """
    drawn = row_order(len(rows), seed, 0)[:num_rows]
    device = default_device()
    batches = []
    for first in range(0, len(drawn), _ROWS_AT_ONCE):
        batch = rows.batch(drawn[first : first + _ROWS_AT_ONCE])
        arrays = {
            "input_ids": batch.tokens_BT.astype(np.int64),
            "position_ids": batch.position_BT,
            "trained": np.ascontiguousarray(batch.trained_BT),
            "kept": batch.segment_BT > 0,
        }
        if arrays["trained"].any():
            batches.append({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    return batches


def _regmean_rule(
    merge: MergeConfig,
    model: torch.nn.Module,
    adapters: Sequence[PeftFolder],
    weights: Sequence[float],
    rows: Sequence[Rows],
) -> Rule:
    parts = read_parts(adapters)
    batches = [batches_of(part, merge.calibration_rows, merge.seed) for part in rows]
    group_of = {module: group for group in _groups(adapters[0], len(adapters)) for module in group}
    held: dict[str, list[torch.Tensor]] = {}
    lock = Lock()

    def grams(module: str) -> list[torch.Tensor]:
        with lock:  # one pass at a time, for a whole group of modules
            if module not in held:
                held.clear()
                fields = [[{k: v for k, v in b.items() if k != "trained"} for b in some] for some in batches]
                found = [collect_grams(model, parts, i, some, group_of[module]) for i, some in enumerate(fields)]
                held.update({name: [one[name] for one in found] for name in group_of[module]})
            return held[module]

    def rule(module: str, factors: Sequence[Factors]) -> tuple[Factors, ModuleFacts]:
        whole = regmean(factors, weights, grams(module), merge.gram_keep)
        whole = Factors(whole.A_RI, whole.B_OR * merge.scale)
        cut, sigma_S = compress(whole, merge.rank, merge.energy)
        written = cut if merge.rank or merge.energy else whole
        products_PP = Stack(factors).inner_products()
        return written, ModuleFacts(written.rank, list(weights), [f.rank for f in factors], products_PP, sigma_S)

    return rule


def _groups(adapter: PeftFolder, num_adapters: int) -> Iterator[list[str]]:
    """Yields the modules in order, as many at a time as their Gram matrices may take."""
    group: list[str] = []
    size = 0
    for module in adapter.modules:
        needed = 4 * num_adapters * adapter.shape(module)[1] ** 2
        if group and size + needed > _GRAM_BYTES:
            yield group
            group, size = [], 0
        group.append(module)
        size += needed
    yield group
