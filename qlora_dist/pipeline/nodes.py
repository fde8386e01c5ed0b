"""From a run's config to its plan: which nodes there are, and what each reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qlora_dist.adapters.merge import PART
from qlora_dist.artifacts.leaves import folder_digest
from qlora_dist.artifacts.objects import is_url
from qlora_dist.artifacts.remote import resolve_root, resolve_staging
from qlora_dist.config import stages as told
from qlora_dist.config.data import DomainConfig
from qlora_dist.config.export import ExportFormat
from qlora_dist.config.fields import everything
from qlora_dist.config.merge import CALIBRATED, MergeMethod
from qlora_dist.config.model import Quantization
from qlora_dist.config.run import RunConfig
from qlora_dist.config.sweep import SweepName
from qlora_dist.config.train import Method
from qlora_dist.data.sources import leaf_digest, plan_parts
from qlora_dist.errors import bad_value
from qlora_dist.export.refusals import refuse_export
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.together import add_workers, rounds_config
from qlora_dist.pipeline.trials import ShardInputs, TrialPlanner, device_bytes

GENERAL, DEVELOPMENT = "general", "validation"


def make_plan(config: RunConfig, command: str = "") -> Plan:
    """Plans a run: records, splits and shards of each domain, the base, an adapter a shard, merge and scores.

    Reads the source files' digests and nothing else; writes nothing.

    Raises:
        ConfigError, DataError: if a source or the base can't be there.
        ModelError: if the base can't be exported as it is asked for.
    """
    planner = _Planner(config, command)
    if config.merge.every_steps:
        adapters = planner.workers()
    else:
        adapters = {label: node for name in config.domain for label, node in planner.adapters_of(name).items()}
    if planner.trials is not None:
        planner.trials.pack()
    if config.train.method is Method.full:
        planner.plan.notes.append("train.method=full: full models are scored one by one, not merged.")
        models = adapters
    elif config.merge.compare:
        models = {"merged": planner.chosen(adapters)}
    elif config.merge.every_steps:
        models = {"merged": planner.merged(adapters)}
    else:
        models = {**adapters, "merged": planner.merged(adapters)}
    if config.export.format is not ExportFormat.none and "merged" in models:
        refuse_export(config.model, config.export)
        needs = {"base": planner.base, "adapter": models["merged"]}
        planner.plan.add("export", "merged", told.ExportedConfig(export=config.export), inputs=needs)
    planner.scores("base", None)
    for name, node in models.items():
        planner.scores(name, node)
    return planner.plan


class _Planner:
    """Adds the nodes of one run to its plan, each after what it reads."""

    def __init__(self, config: RunConfig, command: str) -> None:
        self.config = config
        root, told = resolve_root(config.root), everything(config)
        staging = resolve_staging(config.staging) if is_url(root) else ""
        self.plan = Plan(experiment=config.name, root=root, command=command, config=told, staging=staging)
        self.domains: dict[str, DomainConfig] = {GENERAL: config.general, **config.domain}
        self.splits = {name: self._splits(name) for name in self.domains}
        self.tokenizer = self._tokenizer()
        self.base = self._base()
        self.rows: dict[str, Node] = {}
        is_swept = config.sweep.name is not SweepName.none
        self.trials = TrialPlanner(self.plan, config, device_bytes(config)) if is_swept else None

    def adapters_of(self, name: str) -> dict[str, Node]:
        """Adds the adapters of a domain's shards, and the rows of each; returns the adapters by label."""
        config, shards = self.config, self._shards(name)
        ranks, adapters = config.strategy.world_size, {}
        for shard, label in enumerate(self._labels(name)):
            self.rows[label] = self._rows(label, shard, shards, config.train.row_tokens)
            if self.trials is None:
                inputs = self._adapter_inputs(label, name)
                adapters[label] = self.plan.add("adapter", label, self._recipe(), inputs=inputs, world_size=ranks)
            else:
                adapters[label] = self.trials.add(self._shard_inputs(label, name, shard, shards))
        return adapters

    def workers(self) -> dict[str, Node]:
        """Adds the adapters of all shards as workers that are averaged in rounds; returns them by label."""
        for name in self.config.domain:
            shards = self._shards(name)
            for shard, label in enumerate(self._labels(name)):
                self.rows[label] = self._rows(label, shard, shards, self.config.train.row_tokens)
        inputs = {
            label: self._adapter_inputs(label, name) for name in self.config.domain for label in self._labels(name)
        }
        return add_workers(self.plan, self.config, self._recipe(), self._shard_weights(), inputs)

    def _shards(self, name: str) -> Node:
        domain = self.domains[name]
        config = told.ShardsConfig(
            domain=name, num_shards=domain.num_shards, shard_mode=domain.shard_mode, render=domain.render
        )
        return self.plan.add("shards", name, config, inputs={"tokenizer": self.tokenizer, "splits": self.splits[name]})

    def _labels(self, name: str) -> list[str]:
        return [f"{name}-{shard}" for shard in range(self.domains[name].num_shards)]

    def _recipe(self) -> told.AdapterConfig:
        names = ("model", "lora", "train", "strategy", "seed")
        return told.AdapterConfig(**{name: getattr(self.config, name) for name in names})

    def _adapter_inputs(self, label: str, domain: str) -> dict[str, Node]:
        held_out = self._held_out(domain, DEVELOPMENT)
        return {"base": self.base, "tokenizer": self.tokenizer, "rows": self.rows[label], "validation": held_out}

    def _shard_inputs(self, label: str, domain: str, shard: int, shards: Node) -> ShardInputs:
        return ShardInputs(
            label=label,
            domain=domain,
            base=self.base,
            tokenizer=self.tokenizer,
            rows=lambda row_tokens: self._rows(label, shard, shards, row_tokens),
            held_out=lambda name, row_tokens: self._held_out(name, DEVELOPMENT, row_tokens),
        )

    def _rows(self, label: str, shard: int, shards: Node, row_tokens: int) -> Node:
        domain = self.domains[label.rpartition("-")[0]]
        config = told.RowsConfig(split="train", shard=shard, row_tokens=row_tokens, render=domain.render)
        return self._packed(label, config, {"tokenizer": self.tokenizer, "shards": shards})

    def merged(self, adapters: Mapping[str, Node]) -> Node:
        """Adds the merge that the config names."""
        merge, inputs = self.config.merge, dict(adapters)
        rounds = rounds_config(merge, self._shard_weights()) if merge.every_steps else None
        config = told.MergedConfig(merge=merge, shard_weights=self._shard_weights(), rounds=rounds)
        if merge.method in CALIBRATED:
            config.model = self.config.model
            inputs |= {"base": self.base, **self._calibration("rows-", adapters)}
        return self.plan.add("merged", "all", config, inputs=inputs, means=self._merged_parts(adapters))

    def _merged_parts(self, adapters: Mapping[str, Node]) -> dict[str, Node]:
        """Adds the ranges of modules that a divided merge is joined from; returns them by the merge's input."""
        merge, weights = self.config.merge, self._shard_weights()
        if merge.num_parts == 1:
            return {}
        told_parts = [
            told.MergedPartConfig(merge=merge, shard_weights=weights, part=part, num_parts=merge.num_parts)
            for part in range(merge.num_parts)
        ]
        nodes = [self.plan.add("merged_part", f"all-{one.part}", one, inputs=adapters) for one in told_parts]
        return {f"{PART}{part}": node for part, node in enumerate(nodes)}

    def _calibration(self, prefix: str, labels: Iterable[str]) -> dict[str, Node]:
        """Returns the rows that a merge looks at: each part's own; for a soup, which chooses, development data."""
        if self.config.merge.method is MergeMethod.greedy_soup:
            return {f"{prefix}{n}": self._held_out(n.rpartition("-")[0], DEVELOPMENT) for n in labels}
        return {f"{prefix}{label}": self.rows[label] for label in labels}

    def chosen(self, adapters: Mapping[str, Node]) -> Node:
        """Adds the referee: several merges compared on development data."""
        config = told.ChosenConfig(
            merge=self.config.merge,
            shard_weights=self._shard_weights(),
            model=self.config.model,
            evaluate=self.config.evaluate,
            max_rows=self.config.evaluate.max_rows,
        )
        inputs = {"base": self.base} | {f"adapter-{label}": node for label, node in adapters.items()}
        inputs |= {f"rows-{name}": self._held_out(name, DEVELOPMENT) for name in self.domains}
        if CALIBRATED & set(self.config.merge.compare):
            inputs |= self._calibration("calibration-", adapters)
        return self.plan.add("chosen", "all", config, inputs=inputs)

    def scores(self, name: str, adapter: Node | None) -> Node:
        """Adds the scores of one model on every held-out set."""
        evaluate, full = self.config.evaluate, self.config.train.method is Method.full and adapter is not None
        render = {domain: c.render for domain, c in self.config.domain.items()} if evaluate.max_answers else {}
        terms = {domain: c.terms for domain, c in self.domains.items() if c.terms}
        config = told.ScoresConfig(
            model=self.config.model, evaluate=evaluate, render=render, terms=terms, name=name, full=full
        )
        inputs = {"base": self.base} | ({"adapter": adapter} if adapter else {})
        inputs |= {f"rows-{domain}": self._held_out(domain, evaluate.split) for domain in self.domains}
        if evaluate.max_answers or evaluate.lm_eval_tasks or terms:
            inputs |= {"tokenizer": self.tokenizer}
        if evaluate.max_answers:
            inputs |= {f"splits-{domain}": node for domain, node in self.splits.items()}
        scored = sum(node.stage == "scores" for node in self.plan.nodes)
        group = "" if full else f"models-{scored // evaluate.models_per_job}"
        leaves = self._task_leaves()
        return self.plan.add("scores", name, config, inputs=inputs, leaves=leaves, group=group)

    def _splits(self, name: str) -> Node:
        domain = self.domains[name]
        parts = {}
        for part, files in enumerate(plan_parts(domain, name if name == GENERAL else f"domain.{name}")):
            config = told.RecordsConfig(domain=name, source=domain, files=files, part=part)
            leaves = {"files": leaf_digest(files)}
            parts[f"records-{part}"] = self.plan.add("records", f"{name}-{part}", config, leaves=leaves)
        splits = told.SplitsConfig(domain=name, split=domain.split, max_reject_share=domain.max_reject_share)
        return self.plan.add("splits", name, splits, inputs=parts)

    def _held_out(self, name: str, split: str, row_tokens: int = 0) -> Node:
        row_tokens = row_tokens or self.config.train.row_tokens
        config = told.RowsConfig(split=split, row_tokens=row_tokens, render=self.domains[name].render)
        return self._packed(f"{name}-{split}", config, {"tokenizer": self.tokenizer, "splits": self.splits[name]})

    def _packed(self, label: str, config: told.RowsConfig, inputs: Mapping[str, Node]) -> Node:
        """Adds packed rows; those of another length than the run's say so in their name."""
        name = label if config.row_tokens == self.config.train.row_tokens else f"{label}.t{config.row_tokens}"
        return self.plan.add("rows", name, config, inputs=inputs, subject=label)

    def _tokenizer(self) -> Node:
        model = self.config.model
        if model.path:
            config = told.TokenizerConfig(path=model.path, revision=model.revision)
            return self.plan.add("tokenizer", self._label(), config, leaves=self._base_leaves())
        inputs = {f"splits-{name}": node for name, node in self.splits.items()}
        return self.plan.add("tokenizer", self._label(), told.TokenizerConfig(tiny=model.tiny), inputs=inputs)

    def _base(self) -> Node:
        model = self.config.model
        config = told.BaseConfig(model=model)
        if model.path:
            return self.plan.add("base", self._label(), config, leaves=self._base_leaves())
        render = self.config.general.render
        rows_config = told.RowsConfig(split="train", row_tokens=model.tiny.context_tokens, render=render)
        inputs = {"tokenizer": self.tokenizer, "splits": self.splits[GENERAL]}
        rows = self.plan.add("rows", f"{GENERAL}-train", rows_config, inputs=inputs)
        needs = {"tokenizer": self.tokenizer, "rows": rows}
        tiny = self.plan.add("tiny", self._label(), told.TinyStageConfig(tiny=model.tiny), inputs=needs)
        return self.plan.add("base", self._label(), config, inputs={"tiny": tiny})

    def _label(self) -> str:
        """Returns the base's name in labels: the last part of its path, or `tiny`."""
        path = self.config.model.path
        return Path(path).name.lower().replace(" ", "-") if path else "tiny"

    def _base_leaves(self) -> dict[str, str]:
        """Names a base by the bytes of its folder, or by its hub id and pinned revision."""
        model = self.config.model
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            return {"base": folder_digest(folder, self.plan.store.root)}
        return {"base": f"{model.path}@{model.revision}"}

    def _task_leaves(self) -> dict[str, str]:
        """Returns the digest of the folder of tasks: they are known by their bytes."""
        evaluate = self.config.evaluate
        if not (evaluate.lm_eval_tasks and evaluate.lm_eval_folder):
            return {}
        folder = Path(evaluate.lm_eval_folder).expanduser()
        if not folder.is_dir():
            raise bad_value("evaluate.lm_eval_folder", folder, "a folder of lm-eval task files")
        return {"tasks": folder_digest(folder, self.plan.store.root)}

    def _shard_weights(self) -> dict[str, float]:
        return {f"{name}-{i}": d.shard_weight for name, d in self.config.domain.items() for i in range(d.num_shards)}


def unread_keys(config: RunConfig, keys: Iterable[str]) -> list[str]:
    """Says for each key that was set, but that nothing in this run reads, why that is so."""
    unread: dict[str, str] = {}
    if config.model.path:
        unread["model.tiny."] = "model.path is set"
    else:
        unread["model.revision"] = "the embedded base has no revision"
    if config.train.method is Method.full:
        unread |= {f"{group}.": "train.method=full" for group in ("lora", "merge", "export")}
    if config.model.quantization is Quantization.none:
        unread["model.double_quant"] = "model.quantization=none"
    if not config.merge.compare:
        unread |= {"merge.scales": "merge.compare is empty", "merge.max_forgetting": "merge.compare is empty"}
    return [
        f"{key} was set, but nothing reads it: {why}."
        for key in keys
        for start, why in unread.items()
        if key.startswith(start)
    ]
