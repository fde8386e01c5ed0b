"""What a site's Slurm wants to know of a job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import execution
from qlora_dist.errors import bad_value

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")


class Container(Enum):
    """What starts a container: nothing, pyxis (an option of srun), or apptainer."""

    none = "none"
    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """Site settings. What is empty or 0 is left to the site's own defaults.

    *Light* jobs load no model: they may have a partition and memory of their own, and get no GPU. `time` is in Slurm's
    form (`4:00:00`, `1-12:00:00`); `launcher.timeout_s` sets that of a stage. `memory` is a node's. A job has
    `ranks_per_node` processes on each of its nodes (0: all on one), with `gpus_per_rank` and `cpus_per_rank` each.
    `signal_s` before its time is over a job is asked to write a checkpoint. `shared_root` is a folder that all nodes
    see, in which `root` must lie. `setup` are lines of shell, `options` of sbatch (`--reservation=x`). `python` is
    the one inside the container (empty: that of the launching process).
    """

    partition: str = execution("")
    light_partition: str = execution("")
    account: str = execution("")
    qos: str = execution("")
    time: str = execution("")
    ranks_per_node: int = execution(0, at_least=0)
    gpus_per_rank: int = execution(0, at_least=0, at_most=8)
    gpu_type: str = execution("")
    cpus_per_rank: int = execution(1, at_least=1)
    memory: str = execution("")
    light_memory: str = execution("")
    constraint: str = execution("")
    exclude: str = execution("")
    options: list[str] = execution(list)
    modules: list[str] = execution(list)
    setup: list[str] = execution(list)
    environment: dict[str, str] = execution(dict)
    container: Container = execution(Container.none)
    container_image: str = execution("")
    container_mounts: list[str] = execution(list)
    container_options: list[str] = execution(list)
    python: str = execution("")
    shared_root: str = execution("")
    signal_s: int = execution(180, at_least=0, at_most=65535)
    poll_s: float = execution(5.0, above=0)
    answer_s: float = execution(15.0, above=0)

    def check(self, key: str) -> None:
        """Refuses what sbatch could not read."""
        if self.time:
            seconds_of(self.time, f"{key}.time")
        for name in ("memory", "light_memory"):
            if (value := getattr(self, name)) and not re.fullmatch(r"\d+[KMGT]?", value):
                raise bad_value(f"{key}.{name}", value, "a number with K, M, G or T, as 64G")
        if (self.container is Container.none) != (not self.container_image):
            wanted = f"an image if and only if {key}.container is pyxis or apptainer"
            raise bad_value(f"{key}.container_image", self.container_image, wanted)
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise bad_value(f"{key}.options", option, "options of sbatch, as --reservation=x")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise bad_value(f"{key}.environment.{name}", self.environment[name], "the name of a variable")


def seconds_of(time: str, key: str) -> float:
    """Reads a duration in Slurm's form: minutes, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`; infinite if it says so.

    Raises:
        ConfigError: for anything else.
    """
    if time.lower() in ("infinite", "unlimited"):
        return float("inf")
    found = TIME.fullmatch(time)
    if not found:
        raise bad_value(key, time, "a time as Slurm writes it: 90 (minutes), 4:00:00 or 1-12:00:00")
    fields = [int(field) for field in found["fields"].split(":")]
    if found["days"]:
        hours, minutes, seconds = [*fields, 0, 0][:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(fields) == 3:
        return (fields[0] * 60 + fields[1]) * 60 + fields[2]
    return fields[0] * 60 + (fields[1] if len(fields) == 2 else 0)


def slurm_time(seconds: float) -> str:
    """Writes a duration as sbatch takes it, in whole minutes, rounded up: `D-HH:MM:00`."""
    minutes = max(1, -(-int(seconds + 0.5) // 60))
    days, minutes = divmod(minutes, 24 * 60)
    return f"{days}-{minutes // 60:02d}:{minutes % 60:02d}:00"
