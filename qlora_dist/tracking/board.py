"""The W&B workspace of a project: training, sweep, domains and system, defined in code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_dist.errors import ConfigError

SYSTEM = ("system.cpu", "system.memory_percent", "system.gpu.0.gpu", "system.gpu.0.memoryAllocated")
SWEPT = ("config.lora.lora_rank", "config.lora.lora_alpha", "config.train.learning_rate")


def define_board(entity: str, project: str, domains: Sequence[str]) -> Any:
    """Returns the workspace; its `save()` puts it on the server and its `url` says where.

    Args:
        entity: the W&B user or team.
        project: the project that runs are filed under (`tracking.project`).
        domains: the held-out sets that are shown.

    Raises:
        ConfigError: if `wandb-workspaces` isn't installed.
    """
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2 as panels
    except ImportError as error:
        raise ConfigError(f"{error}. Install it with: pip install 'qlora_dist[board]'.") from error

    def line(title: str, *metrics: str, x: str = "step") -> Any:
        return panels.LinePlot(title=title, x=x, y=list(metrics))

    columns = [panels.ParallelCoordinatesPlotColumn(panels.Config(name)) for name in SWEPT]
    columns.append(panels.ParallelCoordinatesPlotColumn(panels.SummaryMetric("validation_bits_per_byte")))
    training = [line(m.replace("_", " "), m) for m in ("loss", "validation_loss", "learning_rate", "tokens_per_s")]
    sweep = [panels.ParallelCoordinatesPlot(columns=columns), panels.RunComparer(diff_only=True)]
    scored = [
        panels.BarPlot(title=f"{domain}: {metric.replace('_', ' ')}", metrics=[f"{domain}/{metric}"])
        for domain in (*domains, "general")
        for metric in ("bits_per_byte", "completion_loss")
    ]
    sections = [
        workspaces.Section(name="Training", panels=training, is_open=True),
        workspaces.Section(name="Sweep", panels=sweep, is_open=True),
        workspaces.Section(name="Domains", panels=scored, is_open=True),
        workspaces.Section(name="System", panels=[line(name, name, x="Relative Time (Process)") for name in SYSTEM]),
    ]
    runs = workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")])
    return workspaces.Workspace(
        entity=entity, project=project, name="qlora_dist", sections=sections, runset_settings=runs
    )
