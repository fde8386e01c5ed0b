"""Jobs of a plan: nodes of a group share one, and each node's state is told from what is there."""

from pathlib import Path

import pytest

from qlora_dist.config.stages import (
    AdapterConfig,
    HalvedConfig,
    RecordsConfig,
    RowsConfig,
    ShardsConfig,
    SplitsConfig,
    TokenizerConfig,
)
from qlora_dist.config.sweep import TrialConfig
from qlora_dist.config.train import LoraConfig, StrategyConfig, StrategyName
from qlora_dist.launch.base import Job, Machine, State
from qlora_dist.launch.jobs import HEAVY_BYTES, make_jobs, node_states
from qlora_dist.model.footprint import lane_bytes, shape_of
from qlora_dist.pipeline.plan import Plan

MACHINE = Machine(cores=4, memory_bytes=1 << 40, gpus=2)
CPUS = Machine(cores=4, memory_bytes=1 << 40)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan = Plan(experiment="test", root=str(tmp_path), command="", config={})
    one = plan.add("tokenizer", "one", TokenizerConfig(path="one"))
    early = plan.add("rows", "early", RowsConfig(row_tokens=8), inputs={"tokenizer": one}, group="all")
    two = plan.add("tokenizer", "two", TokenizerConfig(path="two"), inputs={"one": one})
    plan.add("rows", "late", RowsConfig(row_tokens=16), inputs={"tokenizer": two}, group="all")
    plan.add("splits", "reader", TokenizerConfig(), inputs={"rows": early})
    (plan.folder / "logs").mkdir(parents=True)
    return plan


def test_a_group_is_one_job_that_comes_after_all_it_needs(plan):
    jobs = make_jobs(plan, plan.nodes, MACHINE, 0)
    assert [job.name for job in jobs] == ["tokenizer/one", "tokenizer/two", "rows+all", "splits/reader"]
    group = jobs[2]
    assert group.nodes == ["rows/early", "rows/late"]
    assert group.after == ["tokenizer/one", "tokenizer/two"]
    assert group.argv[-2:] == [plan.node("rows/early").id, plan.node("rows/late").id]
    assert [job.any_node for job in jobs] == [False, False, True, True]


def test_data_stages_get_the_cores_that_their_corpus_can_use(tmp_path):
    plan = Plan(experiment="test", root=str(tmp_path), command="", config={})
    tokenizer = plan.add("tokenizer", "one", TokenizerConfig())
    for name, size in (("small", 1000), ("large", 100_000_000)):
        config = RecordsConfig(domain=name, files=[f"0:{name}.jsonl@0-{size}"])
        records = {"records-0": plan.add("records", f"{name}-0", config, leaves={"files": name})}
        splits = plan.add("splits", name, SplitsConfig(domain=name), inputs=records)
        inputs = {"tokenizer": tokenizer, "shards": plan.add("shards", name, ShardsConfig(), inputs={"splits": splits})}
        for shard in range(2):
            plan.add("rows", f"{name}-{shard}", RowsConfig(shard=shard), inputs=inputs)
    jobs = {job.name: job for job in make_jobs(plan, plan.nodes, MACHINE, 0)}
    assert {name: job.cores for name, job in jobs.items() if "large" in name} == {
        "records/large-0": 1, "splits/large": 4, "shards/large": 4, "rows/large-0": 2, "rows/large-1": 2
    }  # fmt: skip
    assert all(job.cores == 1 for name, job in jobs.items() if "small" in name)
    assert jobs["splits/large"].environment == {"OMP_NUM_THREADS": "4"}
    assert jobs["splits/large"].memory_bytes > jobs["splits/small"].memory_bytes


def test_a_finished_node_of_a_group_is_not_in_its_job(plan):
    to_run = [node for node in plan.nodes if node.label != "early"]
    jobs = {job.name: job for job in make_jobs(plan, to_run, MACHINE, 0)}
    assert jobs["rows+all"].nodes == ["rows/late"]


def test_states_within_a_job_are_told_from_what_is_there(plan):
    jobs = make_jobs(plan, plan.nodes, MACHINE, 0)
    early, late = plan.node("rows/early"), plan.node("rows/late")
    states = {job.name: State.done for job in jobs} | {"rows+all": State.running}
    assert node_states(plan, jobs, states)["rows/late"] is State.running
    plan.store.folder(early.id).mkdir(parents=True)
    assert node_states(plan, jobs, states)["rows/early"] is State.done
    states["rows+all"] = State.failed
    assert node_states(plan, jobs, states)["rows/late"] is State.skipped
    plan.store.folder(plan.node("tokenizer/two").id).mkdir(parents=True)
    assert node_states(plan, jobs, states)["rows/late"] is State.failed
    plan.failure_path(late).write_text("{}")
    assert node_states(plan, jobs, states) | {"rows/late": State.failed} == node_states(plan, jobs, states)


def test_a_job_of_several_starts_when_one_of_its_nodes_can_be_made(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    job = Job(name="j", argv=[], log=tmp_path / "log", any_node=True, has_inputs=there.exists)
    assert job.can_start([State.done, State.running]) is None
    assert job.can_start([State.done, State.failed]) is True
    there.rmdir()
    assert job.can_start([State.done, State.failed]) is False


def test_a_job_of_one_is_skipped_as_soon_as_one_before_it_is_not_good(tmp_path):
    job = Job(name="j", argv=[], log=tmp_path / "log")
    assert job.can_start([State.failed, State.running]) is False
    assert job.can_start([State.done, State.waiting]) is None
    assert job.can_start([State.done, State.cached]) is True


def test_what_divides_a_base_is_never_sized_to_one_process(tmp_path):
    plan = Plan(experiment="test", root=str(tmp_path), command="", config={})
    for name in (StrategyName.ddp, StrategyName.fsdp, StrategyName.deepspeed):
        config = AdapterConfig(strategy=StrategyConfig(name=name, world_size=2))
        plan.add("adapter", name.name, config, world_size=2)
    sizes = {job.name: job.sizes for job in make_jobs(plan, plan.nodes, CPUS, 0)}
    assert sizes == {"adapter/ddp": [1, 2], "adapter/fsdp": [2], "adapter/deepspeed": [2]}


def test_memory_of_a_training_counts_its_lanes_on_each_process(tmp_path):
    plan = Plan(experiment="test", root=str(tmp_path), command="", config={})
    strategy = StrategyConfig(world_size=2)
    for label, rank, group in (("a", 8, ""), ("b", 8, "two"), ("c", 64, "two"), ("d", 64, "")):
        config = AdapterConfig(lora=LoraConfig(lora_rank=rank), strategy=strategy)
        plan.add("adapter", label, config, group=group, world_size=2)
    held = {job.name: job.memory_bytes for job in make_jobs(plan, plan.nodes, CPUS, 0)}
    small, large = lane(8), lane(64)
    assert held["adapter/a"] == 2 * (HEAVY_BYTES + small)
    assert held["adapter/d"] == 2 * (HEAVY_BYTES + large)
    assert held["adapter+two"] == 2 * (HEAVY_BYTES + 2 * large)
    on_gpus = {job.name: job.memory_bytes for job in make_jobs(plan, plan.nodes, MACHINE, 0)}
    assert set(on_gpus.values()) == {2 * HEAVY_BYTES}, "lanes lie on the GPU there"


def lane(lora_rank: int) -> int:
    told = AdapterConfig(lora=LoraConfig(lora_rank=lora_rank))
    return lane_bytes(shape_of(told.model), told.model, told.lora, told.train)


def test_memory_of_a_halving_counts_the_lanes_that_train_at_once(tmp_path):
    plan = Plan(experiment="test", root=str(tmp_path), command="", config={})
    trials = [TrialConfig(name=str(rank), lora=LoraConfig(lora_rank=rank)) for rank in (8, 16, 64)]
    plan.add("halved", "a", HalvedConfig(trials=trials, lanes=2))
    (job,) = make_jobs(plan, plan.nodes, CPUS, 0)
    assert job.memory_bytes == HEAVY_BYTES + 2 * lane(64)
