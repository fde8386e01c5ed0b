"""From a plan's nodes to the jobs that make them, and from the jobs' states back to the nodes'."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from graphlib import TopologicalSorter
from typing import Any

from omegaconf import OmegaConf

from qlora_dist.config.model import ModelConfig
from qlora_dist.config.train import Checkpointing, LoraConfig, StrategyName, TrainConfig
from qlora_dist.data.blocks import BLOCK_BYTES
from qlora_dist.data.sources import Piece
from qlora_dist.launch.base import Job, Machine, State
from qlora_dist.model.footprint import lane_bytes, shape_of
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.stages import STAGES

LIGHT_BYTES = 600 << 20
"""Memory of a node without torch: measured 0.2 to 0.5 GiB."""
HEAVY_BYTES = 1400 << 20
"""Memory of a node with torch and transformers, before its model: measured 0.9 to 1.2 GiB."""

WORKER_BYTES = 300 << 20
"""Memory of each further process of a stage that spreads its work: measured 0.1 to 0.2 GiB."""


def make_jobs(plan: Plan, to_run: Iterable[Node], machine: Machine, model_bytes: int) -> list[Job]:
    """Makes a job of each node, or of each group of nodes, in an order in which each comes after what it needs.

    Cores depend on the plan and the machine alone, never on what else runs: on a CPU, the number of threads
    is part of what makes a run repeatable to the bit.
    """
    grouped: dict[str, list[Node]] = {}
    for node in to_run:
        grouped.setdefault(node.job, []).append(node)
    widths = {stage: len({node.job for node in plan.nodes if node.stage == stage}) for stage in STAGES}
    jobs = {}
    for name, nodes in grouped.items():
        share = machine.cores // widths[nodes[0].stage] if machine.is_shared else machine.cores * nodes[0].world_size
        stage = STAGES[nodes[0].stage]
        cores = max(1, share) if stage.loads_model else _spread_over(plan, nodes[0], machine) if stage.spreads else 1
        jobs[name] = _make_job(plan, nodes, machine, cores, model_bytes)
    for job in jobs.values():
        several = len(job.nodes) > 1 or any(len(jobs[other].nodes) > 1 for other in job.after if other in jobs)
        job.any_node = several
    order = TopologicalSorter({name: [other for other in job.after if other in jobs] for name, job in jobs.items()})
    return [jobs[name] for name in order.static_order()]


def _make_job(plan: Plan, nodes: Sequence[Node], machine: Machine, cores: int, model_bytes: int) -> Job:
    first, stage = nodes[0], STAGES[nodes[0].stage]
    ranks, lanes = first.world_size, 0 if machine.gpus or not machine.is_shared else _lanes_bytes(nodes)
    worker = ["-m", "qlora_dist.pipeline", plan.address, *(node.id for node in nodes)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    before = (plan.node(artifact_id).job for node in nodes for artifact_id in node.inputs.values())
    return Job(
        name=first.job,
        argv=[sys.executable, *torchrun, *worker],
        worker=worker,
        processes=ranks,
        sizes=list(_sizes(first)),
        log=plan.log_path(first),
        nodes=[node.name for node in nodes],
        after=[name for name in dict.fromkeys(before) if name != first.job],
        has_inputs=partial(_any_ready, plan, nodes),
        words=[plan.failure_path(node) for node in nodes],
        environment={"OMP_NUM_THREADS": str(max(1, cores // ranks))},
        cores=cores,
        meets=stage.meets,
        gpus=min(ranks, machine.gpus) if stage.loads_model else 0,
        memory_bytes=(HEAVY_BYTES + 2 * model_bytes + lanes) * ranks
        if stage.loads_model
        else LIGHT_BYTES + (cores - 1) * WORKER_BYTES,
    )


def _lanes_bytes(nodes: Sequence[Node]) -> int:
    """Returns what the lanes of a job hold on each of its processes: their number, times what the largest holds.

    It is 0 where nothing is trained, or where the base's shape isn't known before it is fetched.
    """
    first = nodes[0].config
    if "trials" in first and "lanes" in first:
        return int(first["lanes"]) * max(_lane_bytes(first["model"], t["lora"], t["train"]) for t in first["trials"])
    if "lora" not in first or "train" not in first:
        return 0
    return len(nodes) * max(_lane_bytes(n.config["model"], n.config["lora"], n.config["train"]) for n in nodes)


def _lane_bytes(model: Mapping[str, Any], lora: Mapping[str, Any], train: Mapping[str, Any]) -> int:
    decides = (
        (lora["lora_rank"], lora["target_modules"]),
        (train["row_tokens"], train["micro_batch_tokens"], train["activation_checkpointing"]),
    )
    return _bytes_of(json.dumps(model), *map(json.dumps, decides))


@cache
def _bytes_of(model: str, lora: str, train: str) -> int:
    """Returns the bytes of a lane; asked once for all that are alike, since a plan may have thousands."""
    told: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), json.loads(model)))
    shape = shape_of(told)
    if shape is None:
        return 0
    (lora_rank, target_modules), (row_tokens, tokens, checkpointing) = json.loads(lora), json.loads(train)
    lane = LoraConfig(lora_rank=lora_rank, target_modules=target_modules)
    recipe = TrainConfig(
        row_tokens=row_tokens, micro_batch_tokens=tokens, activation_checkpointing=Checkpointing[checkpointing]
    )
    return lane_bytes(shape, told, lane, recipe)


def _spread_over(plan: Plan, node: Node, machine: Machine) -> int:
    """Returns the cores of a data stage: no more than find a block of the corpus to work on."""
    siblings = sum(other.stage == node.stage and other.inputs == node.inputs for other in plan.nodes)
    return max(1, min(machine.cores, _corpus_bytes(plan, node) // BLOCK_BYTES // siblings))


def _corpus_bytes(plan: Plan, node: Node) -> int:
    """Returns the bytes of the source files that a node's records come from."""
    before = [plan.node(artifact_id) for name, artifact_id in node.inputs.items() if name != "tokenizer"]
    pieces = [Piece.parse(text) for text in node.config.get("files", [])]
    return sum(piece.end - piece.start for piece in pieces) + sum(_corpus_bytes(plan, other) for other in before)


def _sizes(node: Node) -> Iterator[int]:
    """Yields the numbers of processes by which a training's step divides; other work has the planned one."""
    train, strategy = node.config.get("train"), node.config.get("strategy")
    if not train or not strategy or strategy["name"] == StrategyName.single.name:
        yield node.world_size
        return
    most, group = train["tokens_per_step"] // train["micro_batch_tokens"], strategy["ranks_per_group"] or 1
    least = 2 if StrategyName[strategy["name"]].divides else 1
    yield from (size for size in range(least, most + 1) if most % size == 0 and size % group == 0)


def _any_ready(plan: Plan, nodes: Sequence[Node]) -> bool:
    return any(plan.has_inputs(node) for node in nodes)


def forget_failures(plan: Plan, finished: Collection[str]) -> None:
    """Removes the words of failure of artifacts that are finished after all, by a process that was thought lost.

    A node that reads one, on a machine that doesn't see it yet, would take that word as a reason not to wait.
    """
    for node in plan.nodes:
        if node.id in finished:
            plan.failure_path(node).unlink(missing_ok=True)


def node_states(plan: Plan, jobs: Iterable[Job], states: Mapping[str, State]) -> dict[str, State]:
    """Returns the state of each node of the jobs: where a job makes several, by what is there of each."""
    found = {}
    for job in jobs:
        state = states.get(job.name, State.waiting)
        if len(job.nodes) == 1:
            found[job.nodes[0]] = state
        else:
            found |= {name: _state_within(plan, plan.node(name), state) for name in job.nodes}
    return found


def _state_within(plan: Plan, node: Node, job: State) -> State:
    if job in (State.waiting, State.skipped):
        return job
    if plan.store.has(node.id):
        return State.done
    if plan.failure_path(node).exists() and job is not State.cancelled:
        return State.failed
    if job is State.failed and not plan.has_inputs(node):
        return State.skipped
    return job
