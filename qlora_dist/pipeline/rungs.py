"""What a halving leaves as artifacts: each trial at each rung it reached, and the adapter of each that came to the end.

A rung is known by the trial's recipe and its number of steps, whatever else was swept: a sweep with a trial more
finds the rungs of all others, and trains that one alone. An adapter bears the key that it has in any other run.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.artifacts.fingerprint import recipe_key
from qlora_dist.artifacts.store import Manifest
from qlora_dist.config.fields import everything, identity
from qlora_dist.config.stages import AdapterConfig, HalvedConfig, RungConfig
from qlora_dist.config.sweep import TrialConfig
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.run import circumstances, manifest_of
from qlora_dist.pipeline.tracked import say_made
from qlora_dist.pipeline.winner import LOST
from qlora_dist.runtime import Facts
from qlora_dist.train.course import METRICS_FILE

if TYPE_CHECKING:
    from qlora_dist.evaluate.documents import Document
    from qlora_dist.train.race import Race

STAGE, VERSION = "rung", 1
STATE_FILE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class Rung:
    """A trial at a rung, as it was kept: the sums of its development documents, or why it was lost."""

    folder: Path
    documents: list[Document] = field(default_factory=list)
    lost: str = ""


@dataclass(slots=True)
class Shelf:
    """The artifacts of one shard's trials: read where they are finished, finished where they are not."""

    config: HalvedConfig
    label: str
    inputs: Mapping[str, Path]
    plan: Plan = field(init=False)
    _inputs: dict[str, Node] = field(init=False)

    def __post_init__(self) -> None:
        told = self.config
        self._inputs = {name: _node_of(folder) for name, folder in self.inputs.items()}
        self.plan = Plan(
            experiment=told.experiment,
            root=told.root,
            staging=told.staging,
            command="",
            config={"tracking": everything(told.tracking)},
            nodes=list(self._inputs.values()),
        )

    def adapter(self, trial: TrialConfig) -> Node:
        """Returns the node of a trial's whole training: the same as in a grid, or in a run of that recipe alone."""
        config = AdapterConfig(
            model=self.config.model,
            lora=trial.lora,
            train=trial.train,
            strategy=self.config.strategy,
            seed=trial.seed,
        )
        inputs = {name: self._inputs[name] for name in ("base", "tokenizer", "rows", "validation")}
        return self.plan.add("adapter", f"{self.label}.{trial.name}", config, inputs=inputs, subject=self.label)

    def has_adapter(self, trial: TrialConfig) -> bool:
        """Says that a trial was trained to its end, here or elsewhere: not one that a grid found lost."""
        store, adapter_id = self.plan.store, self.adapter(trial).id
        return store.is_finished(adapter_id) and LOST not in store.manifest(adapter_id).facts

    def rung(self, trial: TrialConfig, steps: int) -> Rung | None:
        """Reads a trial at a rung, None if it never was there."""
        from qlora_dist.evaluate.documents import read_documents

        manifest = self._manifest(trial, steps, {})
        if not self.plan.store.is_finished(manifest.id):
            return None
        folder = self.plan.store.fetch(manifest.id)
        lost = str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["facts"]["lost"])
        return Rung(folder, [] if lost else read_documents(folder), lost)

    def keep_rung(self, trial: TrialConfig, steps: int, race: Race, documents: list[Document], lost: str) -> Rung:
        """Finishes the artifact of a trial at a rung: its state, its metrics so far, its documents."""
        from safetensors.torch import save_file

        from qlora_dist.evaluate.documents import write_documents

        manifest = self._manifest(trial, steps, {"lost": lost, "steps": steps})
        with self.plan.store.owned(manifest.id, f"{self.config.experiment}: {STAGE}/{self.label}.{trial.name}"):
            out = self.plan.store.partial(manifest.id)
            if not lost:
                save_file(race.state(trial.name), out / STATE_FILE)
                write_documents(documents, out)
            metrics = race.job.courses[trial.name].metrics
            if metrics.exists():
                shutil.copyfile(metrics, out / METRICS_FILE)
            return Rung(self.plan.store.commit(manifest), documents, lost)

    def keep_adapter(self, trial: TrialConfig, race: Race) -> None:
        """Finishes the adapter of a trial that has taken its last step."""
        node, facts = self.adapter(trial), race.finish(trial.name)
        with self.plan.store.owned(node.id, f"{self.config.experiment}: {node.name}", resumes=True):
            out = self.plan.store.partial(node.id)
            ignored = shutil.ignore_patterns(".*", "checkpoints")
            if self.plan.store.is_finished(node.id):
                shutil.rmtree(self.plan.store.folder(node.id))  # lost beside other trials; here it came to its end
            shutil.copytree(race.job.courses[trial.name].folder, out, ignore=ignored, dirs_exist_ok=True)
            self.plan.store.commit(manifest_of(self.plan, node, facts, facts["seconds"]))
        say_made(self.plan, node, facts, trial.name)

    def restore(self, trial: TrialConfig, steps: int, race: Race) -> None:
        """Puts a trial where it stood at a rung, unless it is there, or further, already."""
        if race.steps_of(trial.name) >= steps:
            return
        from safetensors.torch import load_file

        found = self.rung(trial, steps)
        assert found is not None and not found.lost, "only who was at a rung goes on from it"
        race.load(trial.name, steps, load_file(found.folder / STATE_FILE), found.folder / METRICS_FILE)

    def _manifest(self, trial: TrialConfig, steps: int, facts: Facts) -> Manifest:
        unnamed = dataclasses.replace(trial, name="")
        config = RungConfig(
            domain=self.config.domain,
            model=self.config.model,
            trial=unnamed,
            steps=steps,
            max_rows=self.config.max_rows,
        )
        recipe: dict[str, Any] = identity(config)
        key = recipe_key(STAGE, VERSION, recipe, {name: node.key for name, node in self._inputs.items()})
        return Manifest(
            stage=STAGE,
            label=self.label,
            key=key,
            version=VERSION,
            recipe=recipe,
            inputs={name: node.id for name, node in self._inputs.items()},
            leaves={},
            execution=everything(config),
            facts=facts,
            made=circumstances(),
        )


def _node_of(folder: Path) -> Node:
    """Reads from a finished artifact what its node was."""
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    named = {name: values[name] for name in ("stage", "label", "key", "recipe", "inputs", "leaves")}
    return Node(config=values["execution"], **named)
