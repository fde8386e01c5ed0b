"""Shards that train together apart: workers start from one adapter, and a coordinator averages what they made of it.

The outer step is Nesterov's on the mean of the workers (Local SGD, arXiv 1805.09767; DiLoCo, arXiv 2311.08105):
g = θ − Σ wᵢ θᵢ; m ← μ m + g; θ ← θ − η (g + μ m). Averaging factors is sound here, and only here: the workers share
a start, so that the cross terms Bᵢ Aⱼ are small of second order. The momentum lies beside the adapter in
`momentum.safetensors`, so that a round can be taken up on any machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qlora_dist.config.merge import MergeWeights, OuterConfig
from qlora_dist.config.stages import RoundsConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.adapter import write_provenance
from qlora_dist.model.peft_folder import CONFIG_FILE, WEIGHTS_FILE, PeftFolder
from qlora_dist.model.tensorfile import TensorFile, TensorWriter
from qlora_dist.model.weights import read_json
from qlora_dist.runtime import Facts, log, write_json

MOMENTUM_FILE, ROUND_FILE = "momentum.safetensors", "round.json"
START = "start"


def average_last_round(config: RoundsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes the adapter that the workers' last round comes to.

    Args:
        config: who trained, and the outer step.
        inputs: the workers, by label; each has in `start/` what the last round began with.
        out: an empty folder.

    Raises:
        ModelError: if the workers' last rounds began with different adapters.
    """
    labels = [label for label in config.workers if label in inputs]
    starts = {label: inputs[label] / START for label in labels}
    bytes_of = {label: (start / WEIGHTS_FILE).read_bytes() for label, start in starts.items()}
    for label in labels[1:]:
        if bytes_of[label] != bytes_of[labels[0]]:
            repair = "Delete both folders, and run the same command again."
            raise ModelError(f"{labels[0]} and {label} began their last round with different adapters. {repair}")
    facts = average_round(config, {START: starts[labels[0]], **{label: inputs[label] for label in labels}}, out)
    (out / MOMENTUM_FILE).unlink()
    with PeftFolder(out) as merged:
        lora_rank = max(merged.rank(module) for module in merged.modules)
        num_modules = len(merged.modules)
    parts = [{"label": label, "weight": weight} for label, weight in facts["weights"].items()]
    shape = {"lora_rank": lora_rank, "num_modules": num_modules, "num_rounds": facts["round"]}
    rounds = [*facts["before"], _of_a_round(facts)]
    return {"method": "rounds", "weights": config.weights.name, "parts": parts, "rounds": rounds, **shape}


def average_round(config: RoundsConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Writes the adapter that the next round starts from, and the momentum of the outer optimizer.

    Args:
        config: who trains, how they are weighted, and the outer step.
        inputs: `start`, the adapter that this round began with, and one adapter for each worker that came back.
            A worker that died is left out; the round goes on with those present.
        out: an empty folder.

    Raises:
        ModelError: if no worker came back, or one isn't of this start.
    """
    workers = {label: path for label, path in inputs.items() if label != START}
    expected = set(config.workers) or set(workers)
    absent = sorted(expected - set(workers))
    if not workers:
        raise ModelError("No worker of this round came back. Start the round again.")
    if absent:
        log.warning("the round goes on without %s", ", ".join(absent))
    counts = {label: _count(config, label, path, inputs[START]) for label, path in workers.items()}
    weights = [counts[label] / sum(counts.values()) for label in workers]
    shutil.copyfile(inputs[START] / CONFIG_FILE, out / CONFIG_FILE)
    moved = _write_step(config.outer, inputs[START], list(workers.values()), weights, out)
    before = inputs[START] / ROUND_FILE
    earlier: Facts = read_json(before, "a round writes it") if before.exists() else {"round": 0}
    facts: Facts = {
        "round": earlier["round"] + 1,
        "weights": dict(zip(workers, weights, strict=True)),
        "absent": absent,
        "moved": moved,
        "before": [*earlier.get("before", []), *([_of_a_round(earlier)] if earlier["round"] else [])],
    }
    write_json(out / ROUND_FILE, facts)
    _write_provenance(workers, inputs[START], out)
    return facts


def outer_step(
    start: torch.Tensor,
    workers: Sequence[torch.Tensor],
    weights: Sequence[float],
    momentum: torch.Tensor,
    config: OuterConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the new values and the new momentum of one tensor, in float32.

    With `momentum=0` and `learning_rate=1` in the config, the new values are the workers' weighted mean.
    """
    mean = torch.stack([w * worker.float() for w, worker in zip(weights, workers, strict=True)]).sum(0)
    gradient = start.float() - mean
    momentum = config.momentum * momentum + gradient
    return start.float() - config.learning_rate * (gradient + config.momentum * momentum), momentum


def _write_step(
    config: OuterConfig, start: Path, workers: Sequence[Path], weights: Sequence[float], out: Path
) -> float:
    """Writes the stepped weights and momentum tensor by tensor; returns how far the weights moved, ‖θ′ − θ‖."""
    moved = 0.0
    files = [TensorFile(path / WEIGHTS_FILE) for path in (start, *workers)]
    was = TensorFile(start / MOMENTUM_FILE) if (start / MOMENTUM_FILE).exists() else None
    try:
        names = list(files[0].entries)
        _check_same(files)
        with TensorWriter(out / WEIGHTS_FILE, names) as values, TensorWriter(out / MOMENTUM_FILE, names) as momenta:
            for name in names:
                first, *others = (file.read(name) for file in files)
                momentum = was.read(name) if was is not None else torch.zeros(first.shape)
                new, momentum = outer_step(first, others, weights, momentum, config)
                moved += float((new - first.float()).square().sum())
                values.add(name, new.to(first.dtype))
                momenta.add(name, momentum)
    finally:
        for file in (*files, *([was] if was is not None else [])):
            file.close()
    return float(moved**0.5)


def _check_same(files: Sequence[TensorFile]) -> None:
    first = {name: entry.shape for name, entry in files[0].entries.items()}
    for file in files[1:]:
        other = {name: entry.shape for name, entry in file.entries.items()}
        if other != first:
            name = next(n for n in sorted(first.keys() | other.keys()) if first.get(n) != other.get(n))
            shown = f"{name} is {other.get(name)}, in the start {first.get(name)}"
            raise ModelError(f"{file.path}: isn't of this round's start: {shown}.")


def _of_a_round(facts: Facts) -> Facts:
    return {name: facts[name] for name in ("round", "weights", "absent", "moved")}


def _count(config: RoundsConfig, label: str, worker: Path, start: Path) -> float:
    """Returns what a worker's share in the average is proportional to."""
    tokens = _tokens(worker, start) if config.weights is MergeWeights.tokens else 1.0
    return config.shard_weights.get(label, 1.0) * tokens


def _tokens(worker: Path, start: Path) -> float:
    """Returns the tokens that a worker trained in this round; 1 for each if they don't say."""
    with PeftFolder(worker) as after, PeftFolder(start) as before:
        if after.provenance is None:
            return 1.0
        earlier = before.provenance.trained_tokens if before.provenance else 0
        return float(max(after.provenance.trained_tokens - earlier, 1))


def _write_provenance(workers: Mapping[str, Path], start: Path, out: Path) -> None:
    """Says what the average was trained on: the start's tokens, and what each worker added."""
    with PeftFolder(start) as before:
        if before.provenance is not None:
            tokens = before.provenance.trained_tokens + sum(_tokens(path, start) for path in workers.values())
            write_provenance(out, replace(before.provenance, trained_tokens=int(tokens)))
