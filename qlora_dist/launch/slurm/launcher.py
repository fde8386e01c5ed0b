"""The launcher that hands a plan's jobs to Slurm, all at once, and watches them; they need it no longer then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.errors import LaunchError
from qlora_dist.launch.base import Job, State
from qlora_dist.launch.slurm.arrays import arrange
from qlora_dist.launch.slurm.client import SilentError, Task, ask, history, queue, uninterrupted
from qlora_dist.launch.slurm.limit import hold_to
from qlora_dist.launch.slurm.lint import lint, most_tasks
from qlora_dist.launch.slurm.script import sbatch_text, submit_text, tasks_text
from qlora_dist.launch.slurm.shape import shape_of
from qlora_dist.launch.slurm.submission import SUBMIT, last_submission, next_folder, write_submission
from qlora_dist.pipeline.plan import PLAN, Plan

SUBMIT_S = 300.0
"""How long all calls of sbatch together may take."""
NEVER = "DependencyNeverSatisfied"


class SlurmLauncher:
    """Submits jobs as arrays at the first `poll`, unless they are in Slurm's queue already."""

    outlives = True

    def __init__(self, plan: Plan, config: LauncherConfig) -> None:
        self._plan, self._config = plan, config
        self._jobs: dict[str, Job] = {}
        self._states: dict[str, State] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._is_submitted = False
        self._asked = 0.0

    def check(self, jobs: Sequence[Job]) -> None:
        """Passes if the site takes these jobs, or if they are in its queue already.

        Raises:
            LaunchError: naming what is in the way, and the repair; nothing was written or submitted.
        """
        lint(self._plan, jobs, self._config)
        living = living_tasks(self._plan.folder, self._config.slurm.answer_s)
        if not living:
            return
        submission = last_submission(self._plan.folder)
        assert submission is not None
        folder = self._plan.folder
        repair = f"Wait for them, or end them: python -m qlora_dist.cancel {folder}; or set name=<other>."
        if len(submission.ids()) < len(submission.arrays):
            raise LaunchError(f"{folder}: only a part of its jobs was submitted, {len(living)} are left. {repair}")
        there = {artifact_id for ids in submission.nodes.values() for artifact_id in ids}
        wanted = {self._plan.node(name).id for job in jobs for name in job.nodes}
        if not wanted or wanted - there:
            what = "is being closed" if not wanted else f"has {len(living)} jobs of another plan in Slurm's queue"
            raise LaunchError(f"{folder} {what}. {repair}")
        self._is_submitted = True
        self._places = submission.places()

    def submit(self, job: Job) -> None:
        """Takes a job; it is sent with all others at the first `poll`."""
        self._jobs[job.name] = job
        self._states[job.name] = State.waiting

    def poll(self) -> Mapping[str, State]:
        """Sends what was taken, then asks Slurm how it stands, every `launcher.slurm.poll_s`.

        Raises:
            LaunchError: if sbatch refuses; what was sent before is taken back.
        """
        if not self._is_submitted:
            self._send()
        if time.monotonic() - self._asked >= self._config.slurm.poll_s:
            with contextlib.suppress(SilentError):  # the jobs go on without a controller, and so does the watching
                self._look()
            self._asked = time.monotonic()
        return dict(self._states)

    def cancel(self) -> None:
        """Ends all jobs that have not ended."""
        cancel_tasks(self._plan.folder, self._config.slurm.answer_s)
        with contextlib.suppress(LaunchError):
            self._look()
        self._states |= {name: State.cancelled for name, state in self._states.items() if not state.has_ended}

    def _send(self) -> None:
        folder, config = next_folder(self._plan.folder), self._config
        (self._plan.folder / "logs").mkdir(parents=True, exist_ok=True)
        jobs = list(self._jobs.values())
        shapes = {job.name: shape_of(job, config) for job in jobs}
        arrays = arrange(jobs, {name: shape.name for name, shape in shapes.items()}, most_tasks(config.slurm.answer_s))
        hold_to(config.max_parallel, arrays)
        ids = {node.name: node.id for node in self._plan.nodes}
        plan = self._plan.folder / PLAN
        texts = {f"{s.name}.sbatch": sbatch_text(s, plan, folder, config, Path.cwd()) for s in set(shapes.values())}
        texts |= {f"{array.name}.tasks": tasks_text(array, ids) for array in arrays}
        write_submission(folder, {**texts, SUBMIT: submit_text(arrays)}, arrays, ids)
        try:
            with uninterrupted():
                ask(["bash", str(folder / SUBMIT)], SUBMIT_S)
        except LaunchError as error:
            raise self._taken_back(error) from error
        submission = last_submission(self._plan.folder)
        assert submission is not None and submission.folder == folder
        self._places = submission.places()
        self._is_submitted = True

    def _taken_back(self, error: LaunchError) -> LaunchError:
        """Cancels what was submitted before sbatch refused; returns the whole complaint."""
        try:
            cancel_tasks(self._plan.folder, self._config.slurm.answer_s)
        except LaunchError:
            repair = f"Once Slurm answers: python -m qlora_dist.cancel {self._plan.folder}"
            return LaunchError(f"{error} What had been submitted could not be taken back. {repair}")
        return LaunchError(f"{error} What had been submitted was taken back.")

    def _look(self) -> None:
        left = [name for name, state in self._states.items() if not state.has_ended]
        places = [self._places[name] for name in left if name in self._places]
        tasks = known_tasks(places, self._config.slurm.answer_s)
        for name in left:
            job = self._jobs[name]
            task = tasks.get(self._places[name]) if name in self._places else None
            before = [self._states[other] for other in job.after if other in self._states]
            self._states[name] = self._state(job, task, before)

    def _state(self, job: Job, task: Task | None, before: Sequence[State]) -> State:
        is_there = bool(job.nodes) and all(self._plan.store.has(self._plan.node(name).id) for name in job.nodes)
        if task is None:  # forgotten, or not in this submission since it was finished
            return State.done if is_there else State.failed
        if not task.has_ended:
            return State.running if task.is_running else State.waiting
        if task.state == "COMPLETED" or is_there:
            return State.done
        failed_before = any(state.has_ended and not state.is_good for state in before)
        if task.reason == NEVER or (failed_before and job.nodes and not job.has_inputs()):
            return State.skipped
        if task.state.startswith("CANCELLED"):
            return State.cancelled
        job.leave_word(why(task, job.stage, job.log), 1)
        return State.failed


def why(task: Task, stage: str, log: Path) -> str:
    """Says how Slurm ended a job that could not say it itself, and what to do."""
    where = f" on {task.nodes}" if task.nodes else ""
    repairs = {
        "TIMEOUT": f"Raise launcher.timeout_s.{stage} or launcher.slurm.time.",
        "OUT_OF_MEMORY": "Raise launcher.slurm.memory (or light_memory).",
        "NODE_FAIL": "Look at that node; the same command goes on from the last checkpoint.",
    }
    repair = repairs.get(task.state, f"See {log}, and Slurm's own words in {log.parent.parent / 'slurm'}.")
    return f"Slurm ended job {task.array}_{task.index}{where} as {task.state} after {task.time}. {repair}"


def known_tasks(places: Iterable[tuple[str, int]], answer_s: float) -> dict[tuple[str, int], Task]:
    """Returns what Slurm knows of some tasks: its queue, then its accounting for what the queue has forgotten.

    The queue forgets a task some minutes after its end, though others of its array still run.

    Raises:
        LaunchError: as `client.queue`.
    """
    wanted = set(places)
    if not wanted:
        return {}
    tasks = queue(sorted({array for array, _ in wanted}), answer_s)
    forgotten = {array for array, _ in wanted - tasks.keys()}
    return (history(sorted(forgotten), answer_s) if forgotten else {}) | tasks


def living_tasks(run_folder: Path, answer_s: float) -> list[Task]:
    """Returns the tasks of a run's last submission that have not ended."""
    submission = last_submission(run_folder)
    ids = submission.ids().values() if submission else []
    return [task for task in queue(ids, answer_s).values() if not task.has_ended] if ids else []


def cancel_tasks(run_folder: Path, answer_s: float) -> int:
    """Ends the tasks of a run's last submission that have not ended; returns how many.

    Raises:
        LaunchError: as `client.ask`.
    """
    living = living_tasks(run_folder, answer_s)
    if living:
        ask(["scancel", "--quiet", *sorted({task.array for task in living})], answer_s)
    return len(living)
