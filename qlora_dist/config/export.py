"""What is shipped besides the PEFT folder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import setting


class ExportFormat(Enum):
    """The file format of an exported model."""

    none = "none"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The format of the export; `none` ships the PEFT folder alone."""

    format: ExportFormat = setting(ExportFormat.none)
