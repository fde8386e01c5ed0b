"""What a training holds in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from qlora_dist.runtime import device, local_world_size, peak_resident_bytes


def peak_memory_bytes() -> int:
    """Returns the most memory held so far: allocated on the GPU where there is one, else this process's own."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def free_memory_bytes() -> int:
    """Returns the memory that this rank may still use: of its GPU, or its share of what this machine has left.

    A container, or a Slurm job with `--mem`, is left less than the machine has: what its control groups allow.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device())[0])
    return min([psutil.virtual_memory().available, *_left_by_groups()]) // local_world_size()


CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def _left_by_groups() -> Iterator[int]:
    """Yields what each control group around this process has left, of both versions; files that it may drop count."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, place in lines:
        if controllers == "":
            top, files = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, files = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / place.lstrip("/")
        for folder in (own, *own.parents):  # a limit may stand at any of them; in a container the last alone is there
            if folder.is_relative_to(top) and (left := _left_by(folder, *files)) is not None:
                yield left


def _left_by(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    """Returns what one control group has left; None where it sets no limit."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
    except (OSError, ValueError):  # `max` is no number
        return None
    return max(0, most - used + int(stat.get(droppable, 0)))
