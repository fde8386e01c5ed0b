"""Where jobs run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import execution


class LauncherName(Enum):
    """What starts the jobs."""

    local = "local"


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """The launcher, and how many jobs it runs at once (0: as many as cores and memory allow)."""

    name: LauncherName = execution(LauncherName.local)
    max_parallel: int = execution(0, at_least=0)
