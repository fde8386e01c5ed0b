"""A plan: every node of a run with its key, in order of need, frozen to `plan.json` once."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qlora_dist.artifacts.fingerprint import differences, recipe_key
from qlora_dist.artifacts.objects import is_url, read_text
from qlora_dist.artifacts.remote import open_store, staging_folder
from qlora_dist.artifacts.store import Store
from qlora_dist.config.fields import everything, identity
from qlora_dist.errors import ArtifactError
from qlora_dist.pipeline.stages import STAGES
from qlora_dist.runtime import ELASTIC_VARIABLE, world_size, write_json

PLAN = "plan.json"


@dataclass(kw_only=True, slots=True)
class Node:
    """One stage for one label: what it is told, what it reads, and the key of what it makes.

    Nodes of one stage with the same `group` share a job: one process that makes them all.
    """

    stage: str
    label: str
    key: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    group: str = ""
    subject: str = ""
    """The label that its artifact bears instead of the node's own: all trials of a shard bear the shard's, so that a
    recipe is the same artifact whether a sweep trains it or nothing but it is trained."""

    @property
    def id(self) -> str:
        """The id of the artifact it makes: `<stage>/<label>-<key>`."""
        return f"{self.stage}/{self.subject or self.label}-{self.key}"

    @property
    def name(self) -> str:
        """The node's name in this plan: `<stage>/<label>`."""
        return f"{self.stage}/{self.label}"

    @property
    def job(self) -> str:
        """The name of the job that makes it: its own, or its group's: `<stage>+<group>`."""
        return f"{self.stage}+{self.group}" if self.group else self.name

    def told(self) -> Any:
        """Rebuilds the stage's config dataclass from the plan's plain values."""
        schema = OmegaConf.structured(STAGES[self.stage].config)
        told: Any = OmegaConf.to_object(OmegaConf.merge(schema, self.config))
        if os.environ.get(ELASTIC_VARIABLE) and hasattr(told, "strategy"):
            told.strategy.world_size = world_size()
        return told


@dataclass(kw_only=True, slots=True)
class Plan:
    """All nodes of a run in order of need, and where they go."""

    experiment: str
    root: str
    command: str
    config: dict[str, Any]
    nodes: list[Node] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    staging: str = ""
    _store: Store | None = field(default=None, init=False, repr=False, compare=False)
    _index: dict[str, Node] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for node in self.nodes:
            self._index |= {node.name: node, node.id: node}

    @property
    def store(self) -> Store:
        """The artifacts of this root, shared by all its experiments."""
        if self._store is None:
            self._store = open_store(self.root, self.staged_root)
        return self._store

    @property
    def staged_root(self) -> Path:
        """The root itself, or the folder of this machine in which a root that is a URL is staged."""
        return staging_folder(self.root, self.staging) if is_url(self.root) else Path(self.root)

    @property
    def folder(self) -> Path:
        """The folder of this experiment, on this machine: plan, logs, report."""
        return self.staged_root / self.experiment

    @property
    def address(self) -> str:
        """What a worker is told to find this plan: a path, or a URL."""
        return f"{self.root}/{self.experiment}/{PLAN}" if is_url(self.root) else str(self.folder / PLAN)

    def log_path(self, node: Node) -> Path:
        """Returns the log file of the job that makes a node."""
        return self.folder / "logs" / f"{node.job.replace('/', '-')}.log"

    def progress_path(self, node: Node) -> Path:
        """Returns where a node says how far it is; nodes that are made jointly say it together."""
        together = bool(node.group and STAGES[node.stage].joint)
        name = node.job if together else node.name
        return self.folder / "logs" / f"{name.replace('/', '-')}.progress.json"

    def failure_path(self, node: Node) -> Path:
        """Returns where a failing node leaves word of why."""
        return self.folder / "logs" / f"{node.stage}-{node.label}.failed.json"

    def has_inputs(self, node: Node) -> bool:
        """Says that everything a node reads is finished."""
        return all(self.store.has(artifact_id) for artifact_id in node.inputs.values())

    def inputs(self, node: Node) -> dict[str, Path]:
        """Returns the folder of everything a node reads, on this machine; what an input names is there as well.

        Raises:
            ArtifactError: if something is not finished.
        """
        for read in map(self.node, node.inputs.values()):
            self.store.inputs({name: read.inputs[name] for name in STAGES[read.stage].names if name in read.inputs})
        return self.store.inputs(node.inputs)

    def node(self, name_or_id: str) -> Node:
        """Finds a node by its name or its artifact's id.

        Raises:
            ArtifactError: if the plan has no such node.
        """
        if name_or_id not in self._index:
            raise ArtifactError(f"{self.folder / PLAN} has no node {name_or_id}. It has: {', '.join(self.names())}.")
        return self._index[name_or_id]

    def names(self) -> list[str]:
        """Returns the name of each node."""
        return [node.name for node in self.nodes]

    def add(
        self,
        stage: str,
        label: str,
        config: Any,
        *,
        inputs: Mapping[str, Node] | None = None,
        means: Mapping[str, Node] | None = None,
        leaves: Mapping[str, str] | None = None,
        world_size: int = 1,
        group: str = "",
        subject: str = "",
    ) -> Node:
        """Adds a node, unless it is there already, and returns it; its key follows from its recipe and its inputs.

        `means` are read too, but say how and not what is made, so they stay out of the key.
        """
        inputs, means = inputs or {}, means or {}
        recipe = identity(config)
        keys = {name: node.key for name, node in inputs.items()}
        key = recipe_key(stage, STAGES[stage].version, recipe, keys, leaves)
        node = Node(
            stage=stage,
            label=label,
            key=key,
            config=everything(config),
            recipe=recipe,
            inputs={name: node.id for name, node in {**inputs, **means}.items()},
            leaves=dict(leaves or {}),
            world_size=world_size,
            group=group,
            subject=subject,
        )
        there = self._index.setdefault(node.name, node)
        assert there.key == key, f"two nodes are called {node.name}"
        if there is node:
            self.nodes.append(node)
            self._index[node.id] = node
        return there

    def write(self) -> Path:
        """Freezes the plan to `plan.json` in the run's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        write_json(self.folder / PLAN, values | {"nodes": [dataclasses.asdict(node) for node in self.nodes]})
        return self.folder / PLAN


def read_plan(address: str | Path) -> Plan:
    """Reads a frozen plan from a path or a URL.

    Raises:
        ArtifactError: if the file is absent or is no plan.
    """
    path = str(address)
    try:
        values = json.loads(read_text(path))
        return Plan(**{**values, "nodes": [Node(**node) for node in values["nodes"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is no plan ({error}). Make one with python -m qlora_dist.launch.") from error


def drift(plan: Plan, before: Plan | None) -> dict[str, list[str]]:
    """Says for each node whose key moved since the plan `before` what moved it, by node name."""
    old = {node.name: node for node in before.nodes} if before else {}
    return {n.name: _moved(n, old[n.name], plan) for n in plan.nodes if n.name in old and old[n.name].key != n.key}


def _moved(node: Node, old: Node, plan: Plan) -> list[str]:
    moved = differences(old.recipe, node.recipe) + [
        f"{name}: other bytes" for name in node.leaves if node.leaves[name] != old.leaves.get(name)
    ]
    moved += [f"no longer reads {name}" for name in old.inputs if name not in node.inputs]
    for name, artifact_id in node.inputs.items():
        if name not in old.inputs:
            moved.append(f"now reads {name}")
        elif old.inputs[name] != artifact_id:
            moved.append(f"through {plan.node(artifact_id).name}")
    return moved or ["the stage's version"]
