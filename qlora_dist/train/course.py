"""A lane's way through a training: where it stands, where that is kept, what was checked of it, and what ended it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.data.rows import Rows
from qlora_dist.errors import QloraDistError
from qlora_dist.model.adapter import ADAPTER_FILES
from qlora_dist.runtime import Facts, log, write_json
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.checkpoint import Checkpoint, Checkpoints, file_digest, recipe_digest
from qlora_dist.train.lanes import Lane

CHECKPOINTS, METRICS_FILE, ENDED_FILE = "checkpoints", "metrics.jsonl", ".ended.json"


@dataclass(slots=True)
class Course:
    """One lane on its way: `step` steps are taken of its budget; it runs until they all are, or an error ends it.

    Its folder holds `metrics.jsonl` and `checkpoints/` while it runs, and in the end the adapter.
    """

    lane: Lane
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    config: Any = None
    """The config of its training, watched for keys that nothing reads; None where there is none."""
    held_out: Rows | None = None
    told_as: str = ""
    """The name under which its metrics are logged; "" where it is the only lane."""
    step: int = 0
    first_step: int = 0
    error: QloraDistError | None = None
    certificate: Certificate = field(default_factory=Certificate)

    @property
    def is_running(self) -> bool:
        """Says whether it has steps left to take."""
        return self.error is None and self.step < self.lane.budget.num_steps

    @property
    def checkpoints(self) -> Checkpoints:
        """Returns where its checkpoints lie."""
        return Checkpoints(self.folder / CHECKPOINTS, self.recipe)

    @property
    def metrics(self) -> Path:
        """Returns the file of its metrics."""
        return self.folder / METRICS_FILE

    def fail(self, error: QloraDistError) -> None:
        """Ends this lane alone; the others go on."""
        self.error = error
        log.warning("%s has ended: %s", self.lane.name, error)


@dataclass(frozen=True, slots=True)
class End:
    """How a lane ended in an earlier life of this job: with facts and a finished adapter, or with an error."""

    facts: Facts | None
    error: str


def write_end(folder: Path, recipe: dict[str, Any], end: End) -> None:
    """Leaves word in a lane's folder that it has ended, so that no later life of the job trains it again.

    The file is hidden, so that it goes when the folder becomes an artifact.
    """
    weights = folder / ADAPTER_FILES[1]
    digest = file_digest(weights) if end.facts is not None else ""
    word = {"recipe": recipe_digest(recipe), "facts": end.facts, "error": end.error, "sha256": digest}
    write_json(folder / ENDED_FILE, word)


def read_end(folder: Path, recipe: dict[str, Any]) -> End | None:
    """Returns how the lane of this recipe ended earlier; None if it didn't, or its adapter isn't what was saved."""
    try:
        word = json.loads((folder / ENDED_FILE).read_text(encoding="utf-8"))
        if word["recipe"] != recipe_digest(recipe):
            return None
        if word["facts"] is not None and word["sha256"] != file_digest(folder / ADAPTER_FILES[1]):
            return None
        return End(word["facts"], word["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def where_to_continue(courses: list[Course], group: str) -> list[Checkpoint | None]:
    """Returns the checkpoint that each course continues from: of one turn if they have one in common, else its newest.

    Lanes that go on together from the turn in which they were together take the same steps to the bit as if nobody
    had stopped them. A job that was killed while it saved has the turn before in common.
    """
    kept = [course.checkpoints.usable() for course in courses]
    turns = [{c.turn for c in found if c.group == group} | ({0} if len(found) < 2 else set()) for found in kept]
    common = set.intersection(*turns) if turns else set()
    is_one_group = all(c.group == group for found in kept for c in found)
    if not common or not is_one_group:
        return [found[0] if found else None for found in kept]
    newest = max(common)
    return [next((c for c in found if c.turn == newest), None) for found in kept]
