"""From a launcher's config to the launcher, connected to what runs its jobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_dist.config.launch import LauncherConfig, LauncherName
from qlora_dist.errors import ConfigError, nearest
from qlora_dist.launch.base import Launcher, Machine
from qlora_dist.pipeline.plan import Plan
from qlora_dist.pipeline.stages import STAGES


@contextmanager
def opened(plan: Plan, config: LauncherConfig) -> Iterator[tuple[Launcher, Machine]]:
    """Opens the launcher that the config names, with what the machines have on which its jobs will run.

    Raises:
        LaunchError: if what it needs isn't there; nothing was submitted then.
    """
    for stage in config.timeout_s:
        if stage not in STAGES:
            raise ConfigError(f"launcher.timeout_s.{stage}: there is no such stage. {nearest(stage, STAGES)}")
    if config.name is LauncherName.ray:
        from qlora_dist.launch.ray import RayLauncher
        from qlora_dist.launch.ray_runtime import connected

        with connected(config.ray) as runtime:
            yield RayLauncher(config, runtime), runtime.machine(config.ray.cpus_per_rank)
        return
    if config.name is LauncherName.slurm:
        from qlora_dist.launch.slurm.launcher import SlurmLauncher

        yield SlurmLauncher(plan, config), Machine(config.slurm.cpus_per_rank, 0, is_shared=False)
        return
    from qlora_dist.launch.local import LocalLauncher, this_machine

    machine = this_machine()
    yield LocalLauncher(machine, config), machine
