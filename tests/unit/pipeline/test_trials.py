"""The plan of a sweep: which adapters there are, under which keys, in which jobs, and who is chosen."""

from pathlib import Path

import pytest

from qlora_dist.errors import ConfigError
from qlora_dist.launch.compose import compose_run
from qlora_dist.pipeline.nodes import make_plan
from qlora_dist.pipeline.plan import Plan, read_plan

HALF = ("train.micro_batch_tokens=1024",)
GRID = ("sweep=grid", "sweep.lora_rank=[4,8]", "sweep.learning_rate=[1e-3,2e-3]")


@pytest.fixture
def plan_of(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text number {i}"}}\n' for i in range(20)))

    def plan(*overrides: str) -> Plan:
        sources = [f"{key}.sources=[{{path: {tmp_path / 'a.jsonl'}}}]" for key in ("domain.files", "general")]
        told = ["domain=files", "train=tiny", "sweep.job_memory_gb=8", *sources, f"root={tmp_path / 'runs'}"]
        return make_plan(compose_run([*told, *overrides]))

    return plan


def adapters(plan: Plan) -> dict[str, str]:
    return {node.label: node.id for node in plan.nodes if node.stage == "adapter"}


def test_a_sweep_has_an_adapter_for_each_trial_and_shard_and_one_winner_a_shard(plan_of):
    plan = plan_of(*GRID)
    names = [f"files-{shard}.r{rank}-lr{rate}" for shard in (0, 1) for rank in (4, 8) for rate in (0.001, 0.002)]
    assert list(adapters(plan)) == names
    assert [n for n in plan.names() if n.startswith("winner/")] == ["winner/files-0", "winner/files-1"]
    inputs = plan.node("winner/files-0").inputs
    assert inputs["adapter-r4-lr0.001"] == plan.node("adapter/files-0.r4-lr0.001").id
    assert inputs["scores-r4-lr0.001"] == plan.node("validated/files-0.r4-lr0.001").id
    assert inputs["scores-base"] == plan.node("validated/files-base").id
    assert plan.node("merged/all").inputs == {f"files-{i}": plan.node(f"winner/files-{i}").id for i in (0, 1)}
    assert plan.node("scores/files-0").inputs["adapter"] == plan.node("winner/files-0").id


def test_a_trial_is_the_same_artifact_as_the_run_of_its_recipe_alone(plan_of):
    swept = adapters(plan_of("sweep=grid", "sweep.lora_rank=[8,16]", "sweep.seed=[1,2]"))
    for rank in (8, 16):
        for seed in (1, 2):
            alone = adapters(plan_of(f"lora.lora_rank={rank}", f"seed={seed}"))
            for shard in (0, 1):
                assert swept[f"files-{shard}.r{rank}-s{seed}"] == alone[f"files-{shard}"]


def test_a_rank_more_leaves_all_other_adapters_and_their_scores_as_they_were(plan_of):
    before, after = (
        {n.id for n in plan_of("sweep=grid", f"sweep.lora_rank={ranks}").nodes if n.stage in ("adapter", "validated")}
        for ranks in ("[4,8]", "[4,8,16]")
    )
    assert before < after
    assert len(after - before) == 2 * 2, "an adapter and its scores for each of two shards"


def test_jobs_and_their_size_are_no_part_of_a_recipe(plan_of):
    assert adapters(plan_of(*GRID)) == adapters(plan_of(*GRID, "sweep.jobs=1", "sweep.lanes=3"))


def jobs(plan: Plan) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for node in plan.nodes:
        if node.stage == "adapter":
            groups.setdefault(node.group, []).append(node.label)
    return list(groups.values())


def test_lanes_are_packed_by_shard_by_number_or_by_memory(plan_of):
    assert [len(job) for job in jobs(plan_of(*GRID))] == [4, 4], "shards fan out over the launcher"
    assert [len(job) for job in jobs(plan_of(*GRID, "sweep.jobs=1"))] == [8]
    assert [len(job) for job in jobs(plan_of(*GRID, "sweep.jobs=3"))] == [3, 3, 2]
    assert [len(job) for job in jobs(plan_of(*GRID, "sweep.lanes=3"))] == [3, 1, 3, 1]
    four = jobs(plan_of("sweep=grid", "sweep.lora_rank=[4,8]", "sweep.jobs=3"))
    assert [len(job) for job in four] == [2, 1, 1], "divided evenly, not rounded up to fewer jobs"
    tight = jobs(plan_of(*GRID, "sweep.job_memory_gb=1.85"))
    assert max(map(len, tight)) < 4
    assert sorted(label for job in tight for label in job) == sorted(adapters(plan_of(*GRID)))


def test_trials_of_unequal_rows_never_share_a_job_and_read_rows_of_their_own(plan_of):
    plan = plan_of("sweep=grid", "sweep.row_tokens=[128,256]")
    assert [len(job) for job in jobs(plan)] == [1, 1, 1, 1]
    short, usual = (plan.node(f"adapter/files-0.row_tokens_{n}") for n in (128, 256))
    assert plan.node(short.inputs["rows"]).config["row_tokens"] == 128
    assert plan.node(usual.inputs["rows"]).name == "rows/files-0"
    scored = [plan.node(f"validated/files-0.row_tokens_{n}").inputs for n in (128, 256)]
    assert scored[0]["rows-files"] == scored[1]["rows-files"], "all are measured on the same documents"


def test_duplicates_are_told_in_the_plan_and_have_no_node(plan_of):
    one, same = "{name: a, lora_alpha: 64, lora_rank: 16}", "{name: b, lora_alpha: 16, use_rslora: true, lora_rank: 16}"
    points = f"sweep.points=[{one}, {same}]"
    plan = plan_of("sweep=grid", points)
    assert list(adapters(plan)) == ["files-0.a", "files-1.a"]
    assert "sweep: b trains the same as a, to the bit" in plan.notes[0]
    assert len(adapters(plan_of("sweep=grid", points, "sweep.find_duplicates=false"))) == 4


def test_a_halving_is_one_node_a_shard_whose_folder_is_merged_and_scored(plan_of):
    plan = plan_of("sweep=halving", "sweep.lora_rank=[4,8]", "sweep.first_rung_tokens=4096")
    halved = plan.node("halved/files-0")
    assert adapters(plan) == {}
    assert plan.node("merged/all").inputs["files-0"] == halved.id
    told = halved.told()
    assert [trial.lora.lora_rank for trial in told.trials] == [4, 8]
    assert (told.eta, told.first_rung_tokens, told.lanes) == (3, 4096, 2)
    again = read_plan(plan.write()).node("halved/files-0").told()
    assert again == told


def test_what_halving_cannot_do_is_said_before_any_work(plan_of):
    with pytest.raises(ConfigError, match=r"strategy.world_size=2: expected 1 with sweep=halving"):
        plan_of(
            "sweep=halving",
            "sweep.lora_rank=[4,8]",
            "strategy=ddp",
            "strategy.world_size=2",
            "train.micro_batch_tokens=1024",
        )
    with pytest.raises(ConfigError, match=r"sweep.row_tokens=128: expected 256 with sweep=halving"):
        plan_of("sweep=halving", "sweep.row_tokens=[128,256]")


def test_a_job_whose_memory_holds_no_base_is_refused_and_one_too_small_for_a_lane_is_told(plan_of):
    with pytest.raises(ConfigError, match=r"sweep.job_memory_gb=0.5: expected more than 1\.\d+, by estimate"):
        plan_of(*GRID, "sweep.job_memory_gb=0.5")
    tight = plan_of(*GRID, "sweep.job_memory_gb=1.75").notes[-1]
    assert "too little for the largest" in tight
    assert "too little" not in plan_of(*GRID).notes[-1]


def test_what_the_other_way_to_walk_a_sweep_reads_is_said_to_be_unread(plan_of):
    notes = plan_of(*GRID, "sweep.eta=2", "sweep.first_rung_tokens=4096").notes
    unread = [note.partition(" ")[0] for note in notes if "nothing reads it: sweep=grid." in note]
    assert unread == ["sweep.eta", "sweep.first_rung_tokens"]
    halving = plan_of("sweep=halving", "sweep.lora_rank=[4,8]", "sweep.jobs=2").notes
    assert "sweep.jobs was set, but nothing reads it: sweep=halving." in halving
    assert not any("nothing reads" in note for note in plan_of(*GRID, "sweep.jobs=2").notes)


def test_the_plan_of_a_halving_names_its_trials(plan_of):
    assert plan_of("sweep=halving", "sweep.lora_rank=[4,8]").notes[-1] == "sweep: the trials are r4, r8."
    many = plan_of("sweep=halving", "sweep.seed=[" + ",".join(map(str, range(14))) + "]").notes[-1]
    assert many.endswith("s10, s11 and 2 more.")
