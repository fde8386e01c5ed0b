"""The nodes of a sweep: an adapter for each trial, packed into jobs by what memory holds, and who is chosen."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import psutil

from qlora_dist.config import stages as told
from qlora_dist.config.run import RunConfig
from qlora_dist.config.sweep import Sweep, SweepConfig, SweepName, TrialConfig, trials_of
from qlora_dist.errors import bad_value
from qlora_dist.model.footprint import base_bytes, lane_bytes, shape_of
from qlora_dist.pipeline.plan import Node, Plan

GENERAL = "general"
PROCESS_BYTES = 1400 << 20
"""Memory of a process with torch and transformers, before its model."""
USED_SHARE = 0.85
"""The share of a device's memory that lanes are packed into: an estimate wants room."""
LANES_UNKNOWN = 8
"""Lanes a job where the base's shape isn't known before it is fetched."""
NAMED = 12
"""So many trials of a halving are named in the plan, where they have no nodes of their own."""


@dataclass(frozen=True, slots=True)
class ShardInputs:
    """What the trials of one shard read; rows are of as many tokens as a trial wants."""

    label: str
    domain: str
    base: Node
    tokenizer: Node
    rows: Callable[[int], Node]
    held_out: Callable[[str, int], Node]


@dataclass(slots=True)
class TrialPlanner:
    """Adds the trials of every shard to a plan, and then divides them into jobs."""

    plan: Plan
    config: RunConfig
    memory_bytes: int
    sweep: Sweep = field(init=False)
    _lanes: list[tuple[Node, TrialConfig]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.sweep = trials_of(config.sweep, config.lora, config.train, config.seed, config.strategy)
        if config.sweep.name is SweepName.halving:
            self._check_halving()
        self._check_memory()

    def add(self, shard: ShardInputs) -> Node:
        """Adds a shard's trials and the node whose folder is the adapter of the chosen one; returns that."""
        if self.config.sweep.name is SweepName.halving:
            return self._halved(shard)
        inputs = {"scores-base": self._validated(f"{shard.domain}-base", shard, None)}
        for trial in self.sweep.trials:
            adapter = self._adapter(shard, trial)
            self._lanes.append((adapter, trial))
            inputs[f"adapter-{trial.name}"] = adapter
            inputs[f"scores-{trial.name}"] = self._validated(adapter.label, shard, adapter)
        settings = self.config.sweep
        config = told.WinnerConfig(
            domain=shard.domain, trials=self.sweep.trials, max_forgetting=settings.max_forgetting
        )
        return self.plan.add("winner", shard.label, config, inputs=inputs)

    def pack(self) -> None:
        """Gives each trial's node its job, and notes in the plan how many there are, and which trials aren't run."""
        for name, same in self.sweep.duplicates.items():
            why = f"sweep: {name} trains the same as {same}, to the bit, and is not run again"
            self.plan.notes.append(f"{why} (sweep.find_duplicates=false would).")
        self.plan.notes += self._unread()
        if not self._lanes:
            self.plan.notes.append(f"sweep: the trials are {self._named()}.")
            return
        jobs = list(self._jobs())
        for number, job in enumerate(jobs):
            for node, _ in job:
                node.group = f"sweep-{number}"
        shards = len({node.subject for node, _ in self._lanes})
        self.plan.notes.append(
            f"sweep: {len(self.sweep.trials)} trials on {shards} shards, {len(self._lanes)} adapters in {len(jobs)} "
            f"jobs of up to {max(map(len, jobs))} lanes{self._estimate()}."
        )

    def _adapter(self, shard: ShardInputs, trial: TrialConfig) -> Node:
        config = told.AdapterConfig(
            model=self.config.model,
            lora=trial.lora,
            train=trial.train,
            strategy=self.config.strategy,
            seed=trial.seed,
        )
        row_tokens = trial.train.row_tokens
        inputs = {"base": shard.base, "tokenizer": shard.tokenizer, "rows": shard.rows(row_tokens)}
        inputs["validation"] = shard.held_out(shard.domain, row_tokens)
        ranks = self.config.strategy.world_size
        label = f"{shard.label}.{trial.name}"
        return self.plan.add("adapter", label, config, inputs=inputs, world_size=ranks, subject=shard.label)

    def _validated(self, label: str, shard: ShardInputs, adapter: Node | None) -> Node:
        """Adds the scores of one trial, or of the base, on development data alone."""
        settings, name = self.config.sweep, shard.label if adapter else "base"
        evaluate = replace(
            self.config.evaluate, split="validation", max_rows=settings.max_rows, max_answers=0, lm_eval_tasks=[]
        )
        config = told.ScoresConfig(model=self.config.model, evaluate=evaluate, name=name)
        inputs = {"base": shard.base} | ({"adapter": adapter} if adapter else {})
        row_tokens = self.config.train.row_tokens
        inputs |= {f"rows-{domain}": shard.held_out(domain, row_tokens) for domain in (shard.domain, GENERAL)}
        group = f"trials-{sum(n.stage == 'validated' for n in self.plan.nodes) // evaluate.models_per_job}"
        subject = shard.label if adapter else shard.domain
        return self.plan.add("validated", label, config, inputs=inputs, group=group, subject=subject)

    def _halved(self, shard: ShardInputs) -> Node:
        settings, row_tokens = self.config.sweep, self.config.train.row_tokens
        config = told.HalvedConfig(
            domain=shard.domain,
            model=self.config.model,
            trials=self.sweep.trials,
            strategy=self.config.strategy,
            eta=settings.eta,
            first_rung_tokens=settings.first_rung_tokens,
            max_forgetting=settings.max_forgetting,
            max_rows=settings.max_rows,
            lanes=self._width(),
            batch_tokens=self.config.evaluate.batch_tokens,
            experiment=self.config.name,
            root=self.plan.root,
            staging=self.plan.staging,
            tracking=self.config.tracking,
        )
        inputs = {"base": shard.base, "tokenizer": shard.tokenizer, "rows": shard.rows(row_tokens)}
        inputs["validation"] = shard.held_out(shard.domain, row_tokens)
        inputs[f"rows-{GENERAL}"] = shard.held_out(GENERAL, row_tokens)
        self.plan.notes.append(
            f"sweep: {shard.label}: {len(self.sweep.trials)} trials, up to {config.lanes} at once in one job; "
            f"one in {settings.eta} goes on from each rung."
        )
        return self.plan.add("halved", shard.label, config, inputs=inputs)

    def _width(self) -> int:
        """Returns how many trials of a halving train at once: its jobs hold the factors of all of them."""
        trials = self.sweep.trials
        if self.config.sweep.lanes or (shape := shape_of(self.config.model)) is None:
            return min(len(trials), self.config.sweep.lanes or LANES_UNKNOWN)
        lanes = [lane_bytes(shape, self.config.model, t.lora, t.train) for t in trials]
        return max(1, min(len(trials), self._room() // max(lanes)))

    def _jobs(self) -> Iterator[list[tuple[Node, TrialConfig]]]:
        """Yields the lanes of each job: of one row length, no more than memory holds, and shards apart by default."""
        settings = self.config.sweep
        for lanes in self._kinds():
            num_jobs = min(settings.jobs or 1, len(lanes))
            starts = [-(-len(lanes) * job // num_jobs) for job in range(num_jobs + 1)]
            for start, end in itertools.pairwise(starts):
                yield from self._fill(lanes[start:end], settings.lanes or len(lanes))

    def _kinds(self) -> list[list[tuple[Node, TrialConfig]]]:
        kinds: dict[tuple[int, str], list[tuple[Node, TrialConfig]]] = {}
        for node, trial in self._lanes:
            apart = "" if self.config.sweep.jobs else node.subject
            kinds.setdefault((trial.train.row_tokens, apart), []).append((node, trial))
        return list(kinds.values())

    def _fill(self, lanes: Sequence[tuple[Node, TrialConfig]], most: int) -> Iterator[list[tuple[Node, TrialConfig]]]:
        shape, model = shape_of(self.config.model), self.config.model
        job: list[tuple[Node, TrialConfig]] = []
        used, room = 0, self._room()
        for node, trial in lanes:
            needed = lane_bytes(shape, model, trial.lora, trial.train) if shape else room // LANES_UNKNOWN
            if job and (len(job) == most or used + needed > room):
                yield job
                job, used = [], 0
            job.append((node, trial))
            used += needed
        yield job

    def _room(self) -> int:
        """Returns the bytes that the lanes of one job may take."""
        return max(1, int(self.memory_bytes * USED_SHARE) - self._taken())

    def _taken(self) -> int:
        """Returns the bytes that a job takes before its lanes: its process and the base."""
        shape = shape_of(self.config.model)
        return PROCESS_BYTES + (base_bytes(shape, self.config.model) if shape else 0)

    def _estimate(self) -> str:
        shape = shape_of(self.config.model)
        if shape is None:
            return ""
        lanes = [lane_bytes(shape, self.config.model, t.lora, t.train) for t in self.sweep.trials]
        short = "" if max(lanes) <= self._room() else ": too little for the largest, which is tried all the same"
        room = f"{self._room() / 1e9:.2g} GB for them in a job{short}"
        return f" (by estimate {max(lanes) / 1e9:.2g} GB a lane at most; {room})"

    def _named(self) -> str:
        names = [trial.name for trial in self.sweep.trials]
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return ", ".join(names[:NAMED]) + rest

    def _unread(self) -> list[str]:
        """Says for each setting of the other way to walk through a sweep that it was set in vain."""
        settings = self.config.sweep
        names = ["jobs"] if settings.name is SweepName.halving else ["eta", "first_rung_tokens"]
        default = SweepConfig()
        changed = [name for name in names if getattr(settings, name) != getattr(default, name)]
        return [f"sweep.{name} was set, but nothing reads it: sweep={settings.name.name}." for name in changed]

    def _check_memory(self) -> None:
        """Refuses a job's memory, as told, that is less than a process with the base takes."""
        told, needed_gb = self.config.sweep.job_memory_gb, self._taken() / USED_SHARE / 1e9
        if told and told <= needed_gb:
            wanted = f"more than {needed_gb:.3g}, by estimate, of which a process with the base takes {USED_SHARE:.0%}"
            repair = "Raise it, or set it to 0: the memory that is there."
            raise bad_value("sweep.job_memory_gb", told, wanted, repair)

    def _check_halving(self) -> None:
        if self.config.strategy.world_size > 1:
            repair = "Set strategy.world_size=1, or sweep=grid."
            raise bad_value("strategy.world_size", self.config.strategy.world_size, "1 with sweep=halving", repair)
        for trial in self.sweep.trials:
            if trial.train.row_tokens != self.config.train.row_tokens:
                wanted = f"{self.config.train.row_tokens} with sweep=halving: its trials share a forward pass"
                raise bad_value("sweep.row_tokens", trial.train.row_tokens, wanted, "Set sweep=grid.")


def device_bytes(config: RunConfig) -> int:
    """Returns the memory that one job's lanes may count on: as told, or of this machine's GPU, or of the machine.

    On a CPU the jobs that run at once share it.
    """
    if config.sweep.job_memory_gb:
        return int(config.sweep.job_memory_gb * 1e9)
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
        if done.returncode == 0 and sizes:
            return min(sizes) << 20
    jobs = config.sweep.jobs or sum(domain.num_shards for domain in config.domain.values())
    return psutil.virtual_memory().total // min(jobs, os.cpu_count() or 1)
