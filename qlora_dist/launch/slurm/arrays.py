"""A plan's jobs as job arrays: those of one shape that wait for the same, or each for its own task of another array."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qlora_dist.launch.base import Job


@dataclass(frozen=True, slots=True)
class Wait:
    """What an array waits for: for some tasks of an array (none named: for all), or task by task (`aftercorr`)."""

    kind: str
    array: str
    tasks: tuple[int, ...] = ()

    def text(self) -> str:
        """Writes it as sbatch takes it, the array's id as a variable of the shell: `afterok:${rows_1}_0`."""
        name = "${" + self.array + "}"
        return ":".join([self.kind, *(f"{name}_{task}" for task in self.tasks)] if self.tasks else [self.kind, name])


@dataclass(slots=True)
class Array:
    """Jobs of one shape, submitted by one call of sbatch; `tasks` by their index, `width` of them at once (0: all)."""

    name: str
    shape: str
    tasks: dict[int, Job]
    waits: list[Wait] = field(default_factory=list)
    width: int = 0

    def indices(self) -> str:
        """Writes its indices as sbatch takes them: `0-3,7%2`."""
        spans: list[list[int]] = []
        for index in sorted(self.tasks):
            if spans and spans[-1][1] == index - 1:
                spans[-1][1] = index
            else:
                spans.append([index, index])
        text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
        return f"{text}%{self.width}" if self.width else text


@dataclass(frozen=True, slots=True)
class _Place:
    array: str
    task: int


class _Arranger:
    """Puts jobs into arrays, in an order in which each comes after what it waits for."""

    def __init__(self, most_tasks: int) -> None:
        self.most_tasks = most_tasks
        self.arrays: dict[str, Array] = {}
        self.places: dict[str, _Place] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def take(self, shape: str, jobs: Sequence[Job]) -> None:
        """Adds arrays for the jobs of one shape, whose needs have places already."""
        for together in self._waiting_alike(jobs):
            if len(together) > 1 or not self._needs(together[0]):
                for chunk in _chunks(together, self.most_tasks):
                    self._add(shape, dict(enumerate(chunk)), self._waits(chunk[0]))
        rest = [job for job in jobs if job.name not in self.places]
        for pairs, tasks in self._paired(rest):
            left = {task: job for task, job in tasks.items() if job.name not in self.places}
            if len(left) > 1:
                waits = self._waits(next(iter(left.values())), apart_from=pairs)
                self._add(shape, left, [*(Wait("aftercorr", array) for array in sorted(pairs)), *waits])
        for job in rest:
            if job.name not in self.places:
                self._add(shape, {0: job}, self._waits(job))

    def _waiting_alike(self, jobs: Sequence[Job]) -> list[list[Job]]:
        alike: dict[object, list[Job]] = defaultdict(list)
        for job in jobs:
            alike[(job.any_node, frozenset(self._needs(job)))].append(job)
        return list(alike.values())

    def _needs(self, job: Job) -> list[_Place]:
        return [self.places[name] for name in job.after if name in self.places]

    def _paired(self, jobs: Sequence[Job]) -> list[tuple[frozenset[str], dict[int, Job]]]:
        """Finds jobs that differ only in which one task of some arrays they wait for: task k for task k.

        Returns the names of those arrays and the jobs by that task, the most jobs first.
        """
        found: dict[tuple[frozenset[str], frozenset[_Place]], dict[int, Job]] = defaultdict(dict)
        for job in jobs:
            needs = [] if job.any_node else self._needs(job)
            by_array: dict[str, set[int]] = defaultdict(set)
            for place in needs:
                if len(self.arrays[place.array].tasks) > 1:
                    by_array[place.array].add(place.task)
            for task in {place.task for place in needs}:
                arrays = frozenset(array for array, tasks in by_array.items() if tasks == {task})
                if arrays:
                    others = frozenset(place for place in needs if place.array not in arrays)
                    found[(arrays, others)].setdefault(task, job)
        largest_first = sorted(found.items(), key=lambda item: -len(item[1]))
        return [(arrays, tasks) for (arrays, _), tasks in largest_first]

    def _waits(self, job: Job, apart_from: frozenset[str] = frozenset()) -> list[Wait]:
        kind = "afterany" if job.any_node else "afterok"
        by_array: dict[str, list[int]] = defaultdict(list)
        for place in self._needs(job):
            if place.array not in apart_from:
                by_array[place.array].append(place.task)
        return [
            Wait(kind, array, () if len(tasks) == len(self.arrays[array].tasks) else tuple(sorted(tasks)))
            for array, tasks in by_array.items()
        ]

    def _add(self, shape: str, tasks: Mapping[int, Job], waits: list[Wait]) -> None:
        name = f"{shape.replace('-', '_')}_{self.counts[shape]}"
        self.counts[shape] += 1
        self.arrays[name] = Array(name, shape, dict(tasks), waits)
        self.places |= {job.name: _Place(name, task) for task, job in tasks.items()}


def arrange(jobs: Sequence[Job], shapes: Mapping[str, str], most_tasks: int) -> list[Array]:
    """Arranges jobs, given in an order of need, into as few arrays as their waits allow.

    Args:
        jobs: each after those it comes after; those not among them are finished.
        shapes: the name of each job's shape, by the job's name.
        most_tasks: more than this is not in one array (Slurm's MaxArraySize).
    """
    arranger = _Arranger(most_tasks)
    for shape, level in _levels(jobs, shapes):
        arranger.take(shape, level)
    return list(arranger.arrays.values())


def _levels(jobs: Sequence[Job], shapes: Mapping[str, str]) -> Iterator[tuple[str, list[Job]]]:
    """Yields jobs of one shape that are equally far from the start, nearest first."""
    depth: dict[str, int] = {}
    levels: dict[tuple[int, str], list[Job]] = defaultdict(list)
    for job in jobs:
        depth[job.name] = 1 + max((depth[name] for name in job.after if name in depth), default=-1)
        levels[(depth[job.name], shapes[job.name])].append(job)
    for (_, shape), level in sorted(levels.items(), key=lambda item: item[0][0]):
        yield shape, level


def _chunks(jobs: Sequence[Job], size: int) -> Iterable[Sequence[Job]]:
    return (jobs[i : i + size] for i in range(0, len(jobs), size))
