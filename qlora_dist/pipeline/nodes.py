"""From a run's config to its plan: which nodes there are, and what each reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qlora_dist.artifacts.leaves import folder_digest
from qlora_dist.config import stages as told
from qlora_dist.config.data import DomainConfig
from qlora_dist.config.fields import everything
from qlora_dist.config.run import RunConfig
from qlora_dist.config.train import Method
from qlora_dist.data.sources import leaf_digest, plan_parts
from qlora_dist.errors import QloraDistError
from qlora_dist.pipeline.plan import Node, Plan

GENERAL = "general"


def make_plan(config: RunConfig, command: str = "") -> Plan:
    """Plans a run: records, splits and shards of each domain, the base, an adapter a shard, merge and scores.

    Reads the source files' digests and nothing else; writes nothing.

    Raises:
        ConfigError, DataError: if a source or the base can't be there.
    """
    root = str(Path(config.root).expanduser().resolve())
    plan = Plan(experiment=config.name, root=root, command=command, config=everything(config))
    domains = {GENERAL: config.general, **config.domain}
    splits = {name: _add_splits(plan, name, domain) for name, domain in domains.items()}
    tokenizer = _add_tokenizer(plan, config, splits)
    held_out = {}
    for name, node in splits.items():
        told_ = told.RowsConfig(
            split=config.evaluate.split, row_tokens=config.train.row_tokens, render=domains[name].render
        )
        inputs = {"tokenizer": tokenizer, "splits": node}
        held_out[f"rows-{name}"] = plan.add("rows", f"{name}-{told_.split}", told_, inputs=inputs)
    base = _add_base(plan, config, tokenizer, splits[GENERAL])
    adapters = _add_adapters(plan, config, tokenizer, base, splits)
    models: dict[str, Node | None] = {"base": None, **adapters}
    if merged := _add_merged(plan, config, adapters):
        models["merged"] = merged
    asked = {"tokenizer": tokenizer, **{f"splits-{name}": node for name, node in splits.items()}}
    asked = asked if config.evaluate.max_answers else {}
    for name, adapter in models.items():
        needs = {"base": base, **({"adapter": adapter} if adapter else {}), **held_out, **asked}
        _add_scores(plan, config, name, needs)
    return plan


def _add_splits(plan: Plan, name: str, domain: DomainConfig) -> Node:
    parts = {}
    try:
        pieces = plan_parts(domain)
    except QloraDistError as error:
        raise type(error)(f"domain.{name}: {error}") from error
    for part, files in enumerate(pieces):
        config = told.RecordsConfig(domain=name, source=domain, files=files, part=part)
        leaves = {"files": leaf_digest(files)}
        parts[f"records-{part}"] = plan.add("records", f"{name}-{part}", config, leaves=leaves)
    config_ = told.SplitsConfig(domain=name, split=domain.split, max_reject_share=domain.max_reject_share)
    return plan.add("splits", name, config_, inputs=parts)


def _add_tokenizer(plan: Plan, config: RunConfig, splits: dict[str, Node]) -> Node:
    model = config.model
    if model.path:
        told_ = told.TokenizerConfig(path=model.path, revision=model.revision)
        return plan.add("tokenizer", model_label(config), told_, leaves=_base_leaves(plan, config))
    inputs = {f"splits-{name}": node for name, node in splits.items()}
    return plan.add("tokenizer", "tiny", told.TokenizerConfig(tiny=model.tiny), inputs=inputs)


def _add_base(plan: Plan, config: RunConfig, tokenizer: Node, general: Node) -> Node:
    told_ = told.BaseConfig(model=config.model)
    if config.model.path:
        return plan.add("base", model_label(config), told_, leaves=_base_leaves(plan, config))
    tiny = config.model.tiny
    rows_config = told.RowsConfig(split="train", row_tokens=tiny.context_tokens, render=config.general.render)
    rows = plan.add("rows", "general-train", rows_config, inputs={"tokenizer": tokenizer, "splits": general})
    made = plan.add("tiny", "tiny", told.TinyStageConfig(tiny=tiny), inputs={"tokenizer": tokenizer, "rows": rows})
    return plan.add("base", "tiny", told_, inputs={"tiny": made})


def _add_adapters(
    plan: Plan, config: RunConfig, tokenizer: Node, base: Node, splits: dict[str, Node]
) -> dict[str, Node]:
    adapters = {}
    for name, domain in config.domain.items():
        shards_config = told.ShardsConfig(
            domain=name, num_shards=domain.num_shards, shard_mode=domain.shard_mode, render=domain.render
        )
        shards = plan.add("shards", name, shards_config, inputs={"tokenizer": tokenizer, "splits": splits[name]})
        rows_config = told.RowsConfig(split="validation", row_tokens=config.train.row_tokens, render=domain.render)
        inputs = {"tokenizer": tokenizer, "splits": splits[name]}
        validation = plan.add("rows", f"{name}-validation", rows_config, inputs=inputs)
        for shard in range(domain.num_shards):
            label = f"{name}-{shard}"
            rows_config = told.RowsConfig(
                split="train", shard=shard, row_tokens=config.train.row_tokens, render=domain.render
            )
            rows = plan.add("rows", label, rows_config, inputs={"tokenizer": tokenizer, "shards": shards})
            needs = {"base": base, "tokenizer": tokenizer, "rows": rows, "validation": validation}
            adapters[label] = _add_adapter(plan, config, label, needs)
    return adapters


def _add_adapter(plan: Plan, config: RunConfig, label: str, needs: dict[str, Node]) -> Node:
    told_ = told.AdapterConfig(
        model=config.model, lora=config.lora, train=config.train, strategy=config.strategy, seed=config.seed
    )
    return plan.add("adapter", label, told_, inputs=needs, world_size=config.strategy.world_size)


def _add_merged(plan: Plan, config: RunConfig, adapters: dict[str, Node]) -> Node | None:
    if config.train.method is Method.full:
        plan.notes.append("train.method=full: full models are scored one by one, not merged.")
        return None
    weights = {f"{name}-{i}": d.shard_weight for name, d in config.domain.items() for i in range(d.num_shards)}
    told_ = told.MergedConfig(merge=config.merge, shard_weights=weights)
    return plan.add("merged", "all", told_, inputs=adapters)


def _add_scores(plan: Plan, config: RunConfig, name: str, needs: dict[str, Node]) -> Node:
    full = config.train.method is Method.full and "adapter" in needs
    render = {domain: c.render for domain, c in config.domain.items()} if config.evaluate.max_answers else {}
    told_ = told.ScoresConfig(model=config.model, evaluate=config.evaluate, render=render, name=name, full=full)
    return plan.add("scores", name, told_, inputs=needs)


def unread_keys(config: RunConfig, keys: Iterable[str]) -> list[str]:
    """Says for each key that was set, but that nothing in this run reads, why that is so."""
    unread = {}
    if config.model.path:
        unread["model.tiny."] = "model.path is set"
    else:
        unread["model.revision"] = "the embedded base has no revision"
    if config.train.method is Method.full:
        unread |= {"lora.": "train.method=full", "merge.": "train.method=full"}
    return [
        f"{key} was set, but nothing reads it: {why}."
        for key in keys
        for start, why in unread.items()
        if key.startswith(start)
    ]


def model_label(config: RunConfig) -> str:
    """Returns the base's name in labels: the last part of its path, or `tiny`."""
    return Path(config.model.path).name.lower().replace(" ", "-") if config.model.path else "tiny"


def _base_leaves(plan: Plan, config: RunConfig) -> dict[str, str]:
    """Names a base by the bytes of its folder, or by its hub id and pinned revision."""
    folder = Path(config.model.path).expanduser()
    if folder.is_dir():
        return {"base": folder_digest(folder, plan.store.root)}
    return {"base": f"{config.model.path}@{config.model.revision}"}
