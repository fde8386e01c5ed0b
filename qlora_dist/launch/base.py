"""What every launcher is given, and what it answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from qlora_dist.pipeline.plan import PLAN, Node, Plan
from qlora_dist.pipeline.stages import STAGES


class State(Enum):
    """Where a job is in its life."""

    waiting = "waiting"
    running = "running"
    cached = "cached"
    done = "done"
    failed = "failed"
    skipped = "skipped"
    cancelled = "cancelled"

    @property
    def is_good(self) -> bool:
        """Says that what the job makes is there."""
        return self in (State.cached, State.done)

    @property
    def has_ended(self) -> bool:
        """Says that the job will not change any more."""
        return self not in (State.waiting, State.running)


@dataclass(kw_only=True, slots=True)
class Job:
    """A command line that makes one node, what it needs of a machine, and the jobs it comes after."""

    name: str
    argv: list[str]
    log: Path
    after: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    cores: int = 1
    gpus: int = 0
    memory_bytes: int = 0


class Launcher(Protocol):
    """Runs jobs somewhere. A job starts when those it comes after are good, and is skipped when one is not."""

    def submit(self, job: Job) -> None:
        """Takes a job; those named in `job.after` were submitted before, or are finished already."""

    def poll(self) -> Mapping[str, State]:
        """Moves things on, and returns the state of every job by its name."""

    def cancel(self) -> None:
        """Ends what runs, gently first; waiting jobs are cancelled."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine has to give: whole cores, bytes of memory, GPUs."""

    cores: int
    memory_bytes: int
    gpus: int = 0


LIGHT_BYTES = 600 << 20
"""Memory of a node without torch: measured 0.2 to 0.5 GiB."""
HEAVY_BYTES = 1400 << 20
"""Memory of a node with torch and transformers, before its model: measured 0.9 to 1.2 GiB."""


def make_job(plan: Plan, node: Node, machine: Machine, model_bytes: int) -> Job:
    """Makes the job of one node: its argv (under torchrun for several processes), and what it needs.

    Cores depend on the plan and the machine alone, never on what else runs: on a CPU, the number of threads
    is part of what makes a run repeatable to the bit.
    """
    stage = STAGES[node.stage]
    width = sum(other.stage == node.stage for other in plan.nodes)
    cores = max(1, machine.cores // width) if stage.loads_model else 1
    gpus = min(node.world_size, machine.gpus) if stage.loads_model else 0
    worker = ["-m", "qlora_dist.pipeline", str(plan.folder / PLAN), node.id]
    if node.world_size > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={node.world_size}"]
        worker = [*torchrun, *worker]
    return Job(
        name=node.name,
        argv=[sys.executable, *worker],
        log=plan.log_path(node),
        after=[plan.node(artifact_id).name for artifact_id in node.inputs.values()],
        environment={"OMP_NUM_THREADS": str(max(1, cores // node.world_size))},
        cores=cores,
        gpus=gpus,
        memory_bytes=(HEAVY_BYTES + 2 * model_bytes) * node.world_size if stage.loads_model else LIGHT_BYTES,
    )
