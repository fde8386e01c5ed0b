"""A run on Slurm that nobody watched: what the closing job says of nodes that could not say it themselves."""

import json
from pathlib import Path

import pytest

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.launch.base import Machine
from qlora_dist.launch.closing import close, closing_job
from qlora_dist.launch.compose import compose_run
from qlora_dist.launch.jobs import make_jobs
from qlora_dist.launch.slurm.arrays import arrange
from qlora_dist.launch.slurm.client import Task
from qlora_dist.launch.slurm.shape import shape_of
from qlora_dist.launch.slurm.submission import IDS, last_submission, next_folder, write_submission
from qlora_dist.launch.standing import standings
from qlora_dist.pipeline.nodes import make_plan
from qlora_dist.pipeline.plan import Plan
from tests.pipeline.conftest import SMALL, make_workplace


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan that was submitted, of which nothing is made."""
    make_workplace(tmp_path)
    sources = [f"{name}.sources=[{{path: {tmp_path / folder}}}]" for name, folder in (("general", "general"),)]
    sources += [f"domain.files.sources=[{{path: {tmp_path / 'legal'}}}]", f"root={tmp_path / 'runs'}"]
    plan = make_plan(compose_run([*SMALL, *sources, "launcher=slurm"]), "the command")
    plan.write()
    jobs = make_jobs(plan, plan.nodes, Machine(1, 0, is_shared=False), 0)
    jobs.append(closing_job(plan, jobs))
    config = LauncherConfig()
    arrays = arrange(jobs, {job.name: shape_of(job, config).name for job in jobs}, 1000)
    folder = next_folder(plan.folder)
    write_submission(folder, {}, arrays, {node.name: node.id for node in plan.nodes})
    (folder / IDS).write_text("".join(f"{array.name} {number}\n" for number, array in enumerate(arrays, 1)))
    return plan


@pytest.mark.parametrize(
    ("state", "repair"),
    [("TIMEOUT", "Raise launcher.timeout_s.records"), ("OUT_OF_MEMORY", "Raise launcher.slurm.memory")],
)
def test_the_summary_says_how_slurm_ended_a_job_and_what_to_do(
    plan: Plan, state: str, repair: str, monkeypatch: pytest.MonkeyPatch
):
    submission = last_submission(plan.folder)
    assert submission
    tasks = {place: Task(*place, "CANCELLED", reason="Dependency") for place in submission.places().values()}
    tasks |= {place: Task(*place, state, "1:00", "n1") for name, place in submission.places().items() if "rec" in name}
    monkeypatch.setattr("qlora_dist.launch.standing.known_tasks", lambda places, answer_s: tasks)
    assert close(plan) == 0
    summary = json.loads((plan.folder / "summary.json").read_text())
    assert summary["state"] == "failed"
    nodes = {f"{node['stage']}/{node['label']}": node for node in summary["nodes"]}
    said = nodes["records/files-0"]["error"]
    assert f"on n1 as {state} after 1:00" in said and repair in said
    assert nodes["splits/files"]["state"] == "skipped"
    assert "records" in (plan.folder / "report.html").read_text()


def test_what_runs_is_waited_for(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    submission = last_submission(plan.folder)
    assert submission
    tasks = {place: Task(*place, "RUNNING", "0:10", "n1") for place in submission.places().values()}
    monkeypatch.setattr("qlora_dist.launch.standing.known_tasks", lambda places, answer_s: tasks)
    assert {one.state for one in standings(plan)[0]} == {"running"}
    assert close(plan) == 75
    assert not (plan.folder / "summary.json").exists()
