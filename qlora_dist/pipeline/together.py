"""The part of a plan in which shards train together apart: a worker a shard, and the folder where they meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qlora_dist.artifacts.fingerprint import recipe_key
from qlora_dist.artifacts.objects import is_url
from qlora_dist.config.fields import identity
from qlora_dist.config.merge import MergeConfig
from qlora_dist.config.run import RunConfig
from qlora_dist.config.stages import AdapterConfig, RoundsConfig, WorkerConfig
from qlora_dist.config.train import StrategyName
from qlora_dist.errors import bad_value
from qlora_dist.pipeline.plan import Node, Plan


def add_workers(
    plan: Plan,
    config: RunConfig,
    recipe: AdapterConfig,
    shard_weights: Mapping[str, float],
    inputs: Mapping[str, Mapping[str, Node]],
) -> dict[str, Node]:
    """Adds a worker for each label of `inputs`, each reading the rows of all, by which they know when they meet.

    Raises:
        ConfigError: for a root that is no folder.
    """
    if is_url(config.root):
        repair = "Set root to a folder on storage that all workers reach."
        raise bad_value("root", config.root, "a folder with merge.every_steps: workers meet in it", repair)
    strategy = recipe.strategy
    if strategy.name is StrategyName.single:
        strategy = replace(strategy, name=StrategyName.ddp)
        plan.notes.append("merge.every_steps: workers train with strategy=ddp, in one process each.")
    rows = {f"rows-{label}": named["rows"] for label, named in inputs.items()}
    worker = WorkerConfig(
        model=recipe.model,
        lora=recipe.lora,
        train=recipe.train,
        strategy=strategy,
        seed=recipe.seed,
        rounds=rounds_config(config.merge, shard_weights),
        wait_s=config.merge.wait_s,
        patience_s=config.merge.patience_s,
    )
    key = recipe_key("rounds", 1, identity(worker), {name: node.key for name, node in rows.items()})
    worker.meeting = str(plan.store.root / "rounds" / key)
    ranks = strategy.world_size
    return {
        label: plan.add("worker", label, replace(worker, label=label), inputs={**named, **rows}, world_size=ranks)
        for label, named in inputs.items()
    }


def rounds_config(merge: MergeConfig, shard_weights: Mapping[str, float]) -> RoundsConfig:
    """Returns what workers and the last merge are told of the rounds."""
    return RoundsConfig(
        workers=list(shard_weights),
        every_steps=merge.every_steps,
        outer=merge.outer,
        weights=merge.weights,
        shard_weights=dict(shard_weights),
    )
