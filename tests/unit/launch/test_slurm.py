"""What is submitted to Slurm, held as text; how jobs become arrays; how Slurm's answers are read."""

import random
import subprocess
from pathlib import Path

import pytest

from qlora_dist.config.fields import check
from qlora_dist.config.launch import LauncherConfig, LauncherName
from qlora_dist.config.slurm import Container, SlurmConfig, seconds_of, slurm_time
from qlora_dist.errors import ConfigError
from qlora_dist.launch.base import Job
from qlora_dist.launch.slurm.arrays import Array, arrange
from qlora_dist.launch.slurm.client import parse_record, parse_task
from qlora_dist.launch.slurm.limit import hold_to
from qlora_dist.launch.slurm.lint import check_shape, nodes_absent, parse_nodes
from qlora_dist.launch.slurm.script import sbatch_text, submit_text
from qlora_dist.launch.slurm.shape import shape_of

SAMPLES = Path(__file__).parents[3] / "slurm"
SITE = SlurmConfig(
    partition="gpu",
    light_partition="cpu",
    account="law",
    time="4:00:00",
    ranks_per_node=4,
    gpus_per_rank=1,
    gpu_type="a100",
    cpus_per_rank=8,
    memory="256G",
    modules=["cuda/12.8"],
    setup=["source /shared/venv/bin/activate"],
    environment={"NCCL_SOCKET_IFNAME": "ib0"},
    python="python",
    options=["--mail-type=END"],
)


def job(name: str, *after: str, processes: int = 1, any_node: bool = False) -> Job:
    log = Path("/shared/runs/legal/logs") / f"{name.replace('/', '-')}.log"
    return Job(name=name, argv=[], log=log, nodes=[name], after=list(after), processes=processes, any_node=any_node)


def text_of(one: Job, site: SlurmConfig = SITE) -> str:
    config = LauncherConfig(name=LauncherName.slurm, slurm=site)
    plan, folder = Path("/shared/runs/legal/plan.json"), Path("/shared/runs/legal/slurm/001")
    return sbatch_text(shape_of(one, config), plan, folder, config, Path("/home/me/law"))


@pytest.mark.parametrize(
    ("one", "sample"),
    [(job("adapter/legal-0", processes=8), "adapter-2x4.sbatch"), (job("rows/legal-0"), "rows.sbatch")],
)
def test_what_is_submitted_is_the_sample_that_people_read(one: Job, sample: str):
    assert text_of(one) == (SAMPLES / sample).read_text()


@pytest.mark.parametrize("site", [SITE, SlurmConfig()])
@pytest.mark.parametrize("one", [job("adapter/a", processes=4), job("rows/a"), job("close")])
def test_what_is_submitted_is_bash(one: Job, site: SlurmConfig, tmp_path: Path):
    text = text_of(one, site)
    (tmp_path / "x").write_text(text)
    assert subprocess.run(["bash", "-n", tmp_path / "x"], check=False).returncode == 0
    assert all(line == line.rstrip() for line in text.splitlines())


def test_containers_wrap_python_and_nothing_else():
    pyxis = text_of(
        job("adapter/a"), SlurmConfig(container=Container.pyxis, container_image="/i.sqsh", python="python")
    )
    assert "--container-image=/i.sqsh" in pyxis
    own = SlurmConfig(
        container=Container.apptainer, container_image="/i.sif", container_mounts=["/data"], python="python"
    )
    assert "    apptainer exec --bind /data /i.sif python -m qlora_dist.pipeline" in text_of(job("adapter/a"), own)


def plan_of(num_domains: int, num_shards: int, num_trials: int = 1) -> list[Job]:
    jobs = [job("tokenizer/t"), job("base/b", "tokenizer/t")]
    for d in range(num_domains):
        jobs += [job(f"shards/d{d}", "tokenizer/t")]
        for s in range(num_shards):
            jobs += [job(f"rows/d{d}-{s}", f"shards/d{d}")]
            jobs += [job(f"adapter/d{d}-{s}-{t}", f"rows/d{d}-{s}", "base/b") for t in range(num_trials)]
    for t in range(num_trials):
        parts = [f"adapter/d{d}-{s}-{t}" for d in range(num_domains) for s in range(num_shards)]
        jobs += [job(f"merged/{t}", *parts)]
    return jobs


def arrays_of(jobs: list[Job], most: int = 1000):
    return arrange(jobs, {one.name: one.stage for one in jobs}, most)


def test_each_adapter_waits_for_its_own_rows_task_by_task():
    arrays = {array.name: array for array in arrays_of(plan_of(1, 3))}
    assert [wait.text() for wait in arrays["adapter_0"].waits] == ["aftercorr:${rows_0}", "afterok:${base_0}"]
    assert arrays["adapter_0"].indices() == "0-2"
    assert [wait.text() for wait in arrays["merged_0"].waits] == ["afterok:${adapter_0}"]


@pytest.mark.parametrize(("domains", "shards", "trials", "most"), [(1, 1, 1, 9), (3, 4, 1, 9), (2, 5, 7, 4)])
def test_arrays_wait_for_exactly_what_their_jobs_come_after(domains: int, shards: int, trials: int, most: int):
    jobs = plan_of(domains, shards, trials)
    arrays = arrays_of(jobs, most)
    by_name = {array.name: array for array in arrays}
    assert sorted(one.name for array in arrays for one in array.tasks.values()) == sorted(one.name for one in jobs)
    seen: set[str] = set()
    for array in arrays:
        assert len(array.tasks) <= most
        for index, one in array.tasks.items():
            waited = set()
            for wait in array.waits:
                assert wait.array in seen
                tasks = by_name[wait.array].tasks
                indices = [index] if wait.kind == "aftercorr" else wait.tasks or tasks
                waited |= {tasks[i].name for i in indices}
            assert waited == set(one.after)
        seen.add(array.name)


def test_thousands_of_jobs_are_a_few_arrays():
    assert len(arrays_of(plan_of(2, 20, 50))) < 110


def test_jobs_that_bear_failures_wait_for_any_end():
    arrays = arrays_of([job("rows/a"), job("scores/x", "rows/a", any_node=True)])
    assert "--dependency=afterany:${rows_0}" in submit_text(arrays)


def test_a_limit_over_all_arrays_has_them_follow_each_other():
    arrays = arrays_of([*plan_of(1, 3), *[job(f"score/{number}") for number in range(9)]])
    hold_to(4, arrays)
    told = {array.name: (array.indices(), [wait.text() for wait in array.waits]) for array in arrays}
    assert told["tokenizer_0"] == ("0%1", [])
    assert told["score_0"] == ("0-8%3", []), "three permits are enough of what it could use"
    assert told["base_0"] == ("0%1", ["afterok:${tokenizer_0}"]), "it follows that anyway"
    assert told["shards_0"][1] == ["afterok:${tokenizer_0}", "afterany:${score_0}"], "which began before base"
    assert told["rows_0"] == ("0-2%3", ["afterok:${shards_0}"]), "all of whose permits have come free with it"
    late = arrays_of([job("rows/a"), job("tiny/a"), job("adapter/a", "tiny/a"), job("adapter/b", "rows/a", "tiny/a")])
    hold_to(2, late)
    assert [wait.text() for wait in late[-1].waits] == ["afterok:${rows_0}", "afterok:${tiny_0}"]
    late = arrays_of([job("rows/a"), job("tiny/a"), job("adapter/a", "tiny/a"), job("score/b", "tiny/a")])
    hold_to(2, late)
    assert [wait.text() for wait in late[-1].waits] == ["afterok:${tiny_0}", "afterany:${rows_0}"], "not the adapter"
    free = arrays_of(plan_of(1, 3))
    hold_to(0, free)
    assert [array.width for array in free] == [0] * len(free)


@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(2))
def test_no_more_run_at_once_than_the_limit_says(most: int, seed: int):
    draw, arrays = random.Random(seed), arrays_of(plan_of(2, 4, 2), most=4)
    hold_to(most, arrays)
    left = {array.name: set(array.tasks) for array in arrays}
    running: dict[tuple[str, int], float] = {}
    now, highest = 0.0, 0
    while any(left.values()):
        now = min(running.values(), default=now)
        for name, index in [task for task, end in running.items() if end <= now]:
            left[name].discard(index)
            del running[name, index]
        for array in arrays:
            for index in sorted(left[array.name]):
                at_once = sum(name == array.name for name, _ in running)
                if (array.name, index) not in running and at_once < array.width and may_start(array, index, left):
                    running[array.name, index] = now + draw.uniform(1, 9)
        highest = max(highest, len(running))
    assert most / 2 <= highest <= most


def may_start(array: Array, index: int, left: dict[str, set[int]]) -> bool:
    """Says that all that a task waits for has ended, as Slurm reads it."""
    for wait in array.waits:
        tasks = {index} if wait.kind == "aftercorr" else set(wait.tasks or left[wait.array])
        if tasks & left[wait.array]:
            return False
    return True


def test_slurms_words_are_read():
    task = parse_task("12|3|PENDING|0:00||Dependency")
    assert (task.array, task.index, task.is_waiting, task.reason) == ("12", 3, True, "Dependency")
    assert parse_task("12|3|COMPLETING|0:01|n1|None").is_running
    assert parse_task("12|N/A|RUNNING|0:01|n1|None") is None
    [record] = parse_record("12_3|CANCELLED by 0|00:00:03|None assigned|None")
    assert (record.state, record.time, record.nodes, record.has_ended) == ("CANCELLED", "0:03", "", True)
    assert [(task.index, task.state) for task in parse_record("12_[4,6-7%2]|PENDING|00:00:00||None")] == [
        (4, "PENDING"),
        (6, "PENDING"),
        (7, "PENDING"),
    ]
    assert parse_record("12|RUNNING|01:02:03|n1|None") == []
    assert parse_record("12_1|RUNNING|01:02:03|n1|None")[0].time == "1:02:03"


@pytest.mark.parametrize(("text", "seconds"), [("90", 5400), ("4:00:00", 14400), ("1-12", 129600), ("2:30", 150)])
def test_times_are_read_as_slurm_writes_them(text: str, seconds: float):
    assert seconds_of(text, "t") == seconds
    assert seconds_of(slurm_time(seconds), "t") >= seconds


SITES = parse_nodes("main*|up|1-00:00:00|2|8+|gpu:a100:4(S:0-1)\ncpu|up|infinite|9|64|(null)")


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"partition": "mian"}, "Did you mean main?"),
        ({"partition": "cpu", "gpus_per_rank": 1}, "at most 0 GPUs"),
        ({"gpu_type": "h100", "gpus_per_rank": 1}, "Valid names: a100"),
        ({"gpus_per_rank": 8}, "at most 4 GPUs"),
        ({"time": "25:00:00"}, "at most 1-00:00:00"),
        ({"ranks_per_node": 1}, "partition main has 2"),
    ],
)
def test_what_a_site_does_not_have_is_named(site: dict, said: str):
    config = LauncherConfig(name=LauncherName.slurm, slurm=SlurmConfig(**site))
    with pytest.raises(ConfigError, match=said):
        check_shape(shape_of(job("adapter/a", processes=4), config), SITES, config)


def test_nodes_that_take_no_job_now_are_counted():
    assert nodes_absent("4|idle\n3|mix\n2|alloc\n1|comp\n1|mix-\n") == 0
    assert nodes_absent("4|idle\n2|idle*\n1|down*\n1|drain\n1|drng\n5|unk*\n1|maint\n") == 11


@pytest.mark.parametrize("site", [{"memory": "lots"}, {"time": "noon"}, {"options": ["x"]}, {"container_image": "i"}])
def test_site_settings_that_sbatch_could_not_read_are_refused(site: dict):
    with pytest.raises(ConfigError, match=r"launcher\.slurm"):
        check(SlurmConfig(**site), "launcher.slurm")
