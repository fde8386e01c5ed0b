"""Tiny stages for the simulated world: records are dealt to shards, counted by trainings that resume, and merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.errors import Preempted
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.stages import STAGES, Stage, StageFunction
from qlora_dist.runtime import Facts
from tests.launch.flight.world import World

NUM_RECORDS = 12
Told = dict[str, Any]


@dataclass(frozen=True)
class TinyStage(Stage):
    """A stage whose work is a function of this module, in one world."""

    work: StageFunction | None = None

    def load(self) -> StageFunction:
        assert self.work is not None
        return self.work


def tiny_stages(world: World) -> dict[str, Stage]:
    """Returns the stages of a world, by the names of the real ones that they stand for."""
    made = {}
    for name, work in (
        ("records", _records),
        ("shards", _shards),
        ("rows", _rows),
        ("adapter", _adapter),
        ("merged", _merged),
        ("scores", _scores),
    ):
        real = STAGES[name]
        made[name] = TinyStage(
            name, real.config, "", loads_model=real.loads_model, resumes=real.resumes, work=_bound(world, work)
        )
    return made


def make_plan(root: Path, num_shards: int, world_size: int, step: int) -> Plan:
    """Makes a plan of these stages: records, shards, and of each shard rows and an adapter; merge and scores.

    A training's step is of `step` micro-batches, so it can have any number of processes that divides it.
    """
    plan = Plan(experiment="flight", root=str(root), command="", config={"tracking": {"name": "none"}})

    def add(stage: str, label: str, config: Told | None = None, *, group: str = "", **inputs: Node) -> Node:
        told = config or {}
        node = Node(
            stage=stage,
            label=label,
            key=f"{len(plan.nodes):012x}",
            config=told,
            recipe={},
            inputs={name: given.id for name, given in inputs.items()},
            world_size=told.get("strategy", {}).get("world_size", 1),
            group=group,
        )
        plan.nodes.append(node)
        plan.__post_init__()
        return node

    strategy = {"name": "ddp", "world_size": world_size, "ranks_per_group": 0}
    training = {"strategy": strategy, "train": {"tokens_per_step": step, "micro_batch_tokens": 1}}
    records = add("records", "all")
    shards = add("shards", "all", {"num_shards": num_shards}, records=records)
    adapters = {}
    for number in range(num_shards):
        rows = add("rows", str(number), {"shard": number}, shards=shards)
        adapters[f"a{number}"] = add("adapter", str(number), training, rows=rows)
    merged = add("merged", "all", **adapters)
    for number in range(2):
        add("scores", str(number), group="models", merged=merged)
    return plan


def _bound(world: World, work: Any) -> StageFunction:
    return lambda config, inputs, out: work(world, config, inputs, out)


def _records(world: World, config: Told, inputs: Mapping[str, Path], out: Path) -> Facts:
    assert world.current is not None
    world.sleep(world.chance.uniform(1, 20))
    half = NUM_RECORDS // 2
    for name, part in (("first", range(half)), ("second", range(half, NUM_RECORDS))):
        world.write(out / f"{name}.txt", "\n".join(map(str, part)))
        world.write(out / f"{name}.life", str(world.current.pid))
        world.sleep(world.chance.uniform(1, 30))
    return {}


def _shards(world: World, config: Told, inputs: Mapping[str, Path], out: Path) -> Facts:
    lives = {(inputs["records"] / f"{half}.life").read_text() for half in ("first", "second")}
    if len(lives) > 1:
        raise AssertionError("two lives wrote one artifact")
    records = [line for half in ("first", "second") for line in (inputs["records"] / f"{half}.txt").read_text().split()]
    for number in range(config["num_shards"]):
        world.sleep(world.chance.uniform(0, 2))
        world.write(out / f"shard-{number}.txt", "\n".join(records[number :: config["num_shards"]]))
    return {}


def _rows(world: World, config: Told, inputs: Mapping[str, Path], out: Path) -> Facts:
    world.sleep(world.chance.uniform(1, 20))
    world.write(out / "rows.txt", (inputs["shards"] / f"shard-{config['shard']}.txt").read_text())
    return {}


def _adapter(world: World, config: Told, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Takes one step a record; what a killed life did after its last checkpoint is done again, and counted once."""
    process, rows = world.current, (inputs["rows"] / "rows.txt").read_text().split()
    assert process is not None
    checkpoint = out / "checkpoint.json"
    seen: list[str] = json.loads(checkpoint.read_text())["seen"] if checkpoint.exists() else []
    process.minds_stop = True
    try:
        for record in rows[len(seen) :]:
            world.sleep(world.chance.uniform(1, 25))
            seen.append(record)
            stops = process.is_asked_to_stop
            if stops or len(seen) % 3 == 0:
                world.write(out / ".checkpoint", json.dumps({"seen": seen}))
                (out / ".checkpoint").replace(checkpoint)
            if stops and len(seen) < len(rows):
                raise Preempted("stopped on request")
    finally:
        process.minds_stop = False
    world.write(out / "adapter.json", json.dumps({"seen": seen}))
    checkpoint.unlink(missing_ok=True)
    return {"seen": len(seen)}


def _merged(world: World, config: Told, inputs: Mapping[str, Path], out: Path) -> Facts:
    world.sleep(world.chance.uniform(1, 10))
    seen = {name: json.loads((folder / "adapter.json").read_text())["seen"] for name, folder in inputs.items()}
    world.write(out / "merged.json", json.dumps(seen, sort_keys=True))
    return {}


def _scores(world: World, config: Told, inputs: Mapping[str, Path], out: Path) -> Facts:
    world.sleep(world.chance.uniform(1, 10))
    seen = json.loads((inputs["merged"] / "merged.json").read_text())
    world.write(out / "scores.json", json.dumps({"count": sum(map(len, seen.values()))}))
    return {}
