"""The shape of a job on a cluster: how many nodes it has, how many processes on each, and what each node gives."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.config.launch import LauncherConfig
from qlora_dist.config.slurm import seconds_of
from qlora_dist.errors import bad_value
from qlora_dist.launch.base import Job
from qlora_dist.pipeline.stages import STAGES

CLOSE = "close"
"""The stage, in a manner of speaking, of the job that closes a run."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What jobs have in common whose sbatch texts are the same."""

    stage: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_node: int
    threads: int
    is_light: bool

    @property
    def name(self) -> str:
        """Its stage, and its size where a job has several processes: `adapter-2x4` for 4 on each of 2 nodes."""
        return f"{self.stage}-{self.nodes}x{self.ranks_per_node}" if self.processes > 1 else self.stage

    @property
    def processes(self) -> int:
        """The number of processes of a job."""
        return self.nodes * self.ranks_per_node

    def seconds(self, config: LauncherConfig) -> float:
        """Returns how long a job may take, 0 where the site's default says it."""
        if self.stage in config.timeout_s:
            return config.timeout_s[self.stage]
        return seconds_of(config.slurm.time, "launcher.slurm.time") if config.slurm.time else 0.0

    def partition(self, config: LauncherConfig) -> str:
        """Returns the partition that its jobs are sent to, empty for the site's default."""
        slurm = config.slurm
        return (slurm.light_partition if self.is_light else "") or slurm.partition


def shape_of(job: Job, config: LauncherConfig) -> Shape:
    """Returns the shape of a job.

    Raises:
        ConfigError: if its processes can't be dealt to whole nodes.
    """
    slurm = config.slurm
    is_light = job.stage == CLOSE or not STAGES[job.stage].loads_model
    ranks = slurm.ranks_per_node if 0 < slurm.ranks_per_node < job.processes else job.processes
    if job.processes % ranks:
        wanted = f"a divisor of the {job.processes} processes of {job.name}"
        raise bad_value("launcher.slurm.ranks_per_node", slurm.ranks_per_node, wanted)
    return Shape(
        stage=job.stage,
        nodes=job.processes // ranks,
        ranks_per_node=ranks,
        gpus_per_node=0 if is_light else ranks * slurm.gpus_per_rank,
        cpus_per_node=ranks * (1 if is_light else slurm.cpus_per_rank),
        threads=1 if is_light else slurm.cpus_per_rank,
        is_light=is_light,
    )
