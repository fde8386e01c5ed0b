"""Where jobs run, and what is done when they don't end well."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qlora_dist.config.fields import execution
from qlora_dist.config.slurm import SlurmConfig
from qlora_dist.errors import bad_value


class LauncherName(Enum):
    """What starts the jobs."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass(kw_only=True, slots=True)
class RayConfig:
    """Which Ray cluster runs the jobs, what they ask of it, and how they bear the loss of nodes.

    `address` is empty (a cluster of this run's own, on this machine), `auto`, `host:port` or `ray://host:port`. A
    training that may have between `min_workers` and `max_workers` processes (0: as many as the strategy says) takes
    fewer when the nodes for all of them are not there within `wait_s`, and all again once they are. `cpus_per_rank` are
    a process's CPUs and threads (0: the largest node's, divided among the jobs of a stage). `resources` adds to what
    the jobs of a stage ask for, by stage.
    """

    address: str = execution("")
    min_workers: int = execution(0, at_least=0)
    max_workers: int = execution(0, at_least=0)
    processes_per_node: int = execution(0, at_least=0)
    cpus_per_rank: int = execution(0, at_least=0)
    wait_s: float = execution(60.0, at_least=0)
    give_up_s: float = execution(3600.0, above=0)
    resources: dict[str, dict[str, float]] = execution(dict)
    runtime_env: dict[str, Any] = execution(dict)

    def check(self, key: str) -> None:
        """Refuses bounds that cross, and an address that is none."""
        if self.max_workers and self.min_workers > self.max_workers:
            raise bad_value(f"{key}.min_workers", self.min_workers, f"at most {key}.max_workers = {self.max_workers}")
        if self.address and self.address != "auto" and not re.fullmatch(r"(ray://)?[^:/\s]+:\d+", self.address):
            wanted = "empty (a cluster of this run's own), auto, HOST:PORT or ray://HOST:PORT"
            raise bad_value(f"{key}.address", self.address, wanted)


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """The launcher, and how many jobs it runs at once (0: as many as cores and memory allow).

    A job that was killed, timed out, or lost its machine is run again up to `retries` times, after `retry_wait_s`,
    twice that, and so on; its own error is never retried. `timeout_s` limits one life of the jobs of a stage, by
    stage: a training goes on from its checkpoint in the next.
    """

    name: LauncherName = execution(LauncherName.local)
    max_parallel: int = execution(0, at_least=0)
    retries: int = execution(2, at_least=0)
    retry_wait_s: float = execution(5.0, at_least=0)
    timeout_s: dict[str, float] = execution(dict, above=0)
    slurm: SlurmConfig = execution(SlurmConfig)
    ray: RayConfig = execution(RayConfig)
