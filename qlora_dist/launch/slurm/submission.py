"""What was submitted: a folder of texts in the run's folder, `slurm/001`, kept as it ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.launch.slurm.arrays import Array
from qlora_dist.runtime import write_json

JOBS, IDS, SUBMIT = "jobs.json", "ids", "submit.sh"


@dataclass(frozen=True, slots=True)
class Submission:
    """One submission of a run: which job is which task of which array, and the nodes of each job."""

    folder: Path
    arrays: Mapping[str, Mapping[int, str]]
    """The job of each task, by the array's name and the task's index."""
    nodes: Mapping[str, Sequence[str]]
    """The artifact ids of each job's nodes, by the job's name."""

    def ids(self) -> dict[str, str]:
        """Returns Slurm's id of each array that was submitted, by the array's name."""
        try:
            lines = (self.folder / IDS).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        return dict(line.split() for line in lines if line.count(" ") == 1)

    def places(self) -> dict[str, tuple[str, int]]:
        """Returns Slurm's name of each job: the array's id, and the index."""
        ids = self.ids()
        return {
            job: (ids[array], index)
            for array, tasks in self.arrays.items()
            if array in ids
            for index, job in tasks.items()
        }


def next_folder(run_folder: Path) -> Path:
    """Returns the folder of the next submission; it isn't made."""
    return run_folder / "slurm" / f"{len(_folders(run_folder)) + 1:03d}"


def last_submission(run_folder: Path) -> Submission | None:
    """Reads the last submission of a run; None if there is none."""
    for folder in reversed(_folders(run_folder)):
        try:
            said = json.loads((folder / JOBS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        arrays = {name: {int(i): job for i, job in tasks.items()} for name, tasks in said["arrays"].items()}
        return Submission(folder, arrays, said["nodes"])
    return None


def write_submission(folder: Path, texts: Mapping[str, str], arrays: Sequence[Array], ids: Mapping[str, str]) -> None:
    """Writes a submission's texts and its list of jobs, the list last; `ids` are the artifacts' by node name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    jobs = [job for array in arrays for job in array.tasks.values()]
    said = {
        "arrays": {array.name: {str(i): job.name for i, job in array.tasks.items()} for array in arrays},
        "nodes": {job.name: [ids[name] for name in job.nodes] for job in jobs},
    }
    write_json(folder / JOBS, said)


def _folders(run_folder: Path) -> list[Path]:
    return sorted(path for path in (run_folder / "slurm").glob("[0-9]*") if path.is_dir())
