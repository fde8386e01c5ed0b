"""How many processes a job has on a cluster, what they ask for, and how they are divided over its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qlora_dist.config.launch import RayConfig
from qlora_dist.launch.base import Job
from qlora_dist.pipeline.stages import STAGES

Resources = dict[str, float]


class Sizing:
    """Sizes jobs by what the config allows and the nodes hold. Nodes are given by what each has in all."""

    def __init__(self, config: RayConfig) -> None:
        self._config = config

    def is_light(self, job: Job) -> bool:
        """Says that a job is a plain task: one process that loads no model."""
        return job.processes == 1 and not STAGES[job.stage].loads_model

    def sizes(self, job: Job) -> list[int]:
        """Returns the numbers of processes that a job may have, the largest first.

        Those between `min_workers` and `max_workers` at which its step divides; without bounds the planned one alone.
        """
        least = min(self._config.min_workers or job.processes, job.processes)
        most = max(self._config.max_workers or job.processes, least)
        return sorted({size for size in job.sizes if least <= size <= most} or {job.processes}, reverse=True)

    def needs(self, job: Job, processes: int) -> Resources:
        """Returns what that many processes of a job ask of Ray."""
        needs = {"CPU": float(max(1, job.cores // job.processes))}
        if job.gpus:
            needs["GPU"] = 1.0
        needs |= self._config.resources.get(job.stage, {})
        return {key: value * processes for key, value in needs.items() if value}

    def fits(self, job: Job, size: int, nodes: Sequence[Resources]) -> bool:
        """Says that the nodes could hold so many processes of a job, if nothing else ran."""
        return sum(self._held(job, size, nodes)) >= size

    def is_free(self, job: Job, processes: int, free: Resources) -> bool:
        """Says that what so many processes ask for is unused."""
        return all(free.get(key, 0.0) >= value for key, value in self.needs(job, processes).items())

    def shares(self, job: Job, size: int, nodes: Sequence[Resources]) -> list[int]:
        """Divides processes over nodes: as the living ones hold them, else equally, as a wish for more nodes."""
        held = self._held(job, size, nodes)
        if sum(held) >= size:
            return list(_take(held, size))
        return list(_take([max([*held, self._config.processes_per_node, 1])] * size, size))

    def complaint(self, job: Job, nodes: Sequence[Resources]) -> str:
        """Says what a job needs that the cluster doesn't have."""
        wanted, there = _shown(self.needs(job, 1)), "; ".join(map(_shown, nodes)) or "none"
        repair = "Add nodes, or lower launcher.ray.min_workers or launcher.ray.resources."
        return f"{job.name} needs {self.sizes(job)[-1]} x ({wanted}), and the nodes have: {there}. {repair}"

    def _held(self, job: Job, size: int, nodes: Sequence[Resources]) -> list[int]:
        """Returns how many of a job's processes each node could hold, the largest first."""
        most, needs = self._config.processes_per_node or size, self.needs(job, 1)
        return sorted((min(_capacity(node, needs), most) for node in nodes), reverse=True)


def _capacity(node: Resources, needs: Resources) -> int:
    return int(min(node.get(key, 0.0) // value for key, value in needs.items()))


def _take(held: Sequence[int], size: int) -> Iterator[int]:
    for most in held:
        if size > 0:
            yield min(most, size)
        size -= most


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {key}" for key, value in resources.items() if ":" not in key and "memory" not in key)
