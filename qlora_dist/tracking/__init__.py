"""Training curves go to trackers through one door: `open_tracker`. W&B is imported in this package alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_dist.config.evaluate import TrackingConfig, TrackingName
from qlora_dist.runtime import Sink, rank

__all__ = ["open_tracker"]


@contextmanager
def open_tracker(
    config: TrackingConfig,
    *,
    name: str,
    run_id: str,
    group: str,
    job_type: str,
    recipe: Mapping[str, Any],
    folder: Path,
) -> Iterator[Sink | None]:
    """Yields the tracker's sink on rank 0, and None on other ranks or with `tracking=none`.

    Args:
        config: the tracker and its project.
        name: what people call the run (the node's label).
        run_id: the recipe's key, so that a requeued job goes on in its own run.
        group: the experiment.
        job_type: the stage.
        recipe: the run's config columns, plain JSON values.
        folder: where the tracker keeps its files; it is made when absent.
    """
    if rank() != 0 or config.name is TrackingName.none:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    if config.name is TrackingName.tensorboard:
        from qlora_dist.tracking.tensorboard import open_board

        with open_board(folder, run_id, recipe) as board:
            yield board
        return
    from qlora_dist.tracking.weights_and_biases import Run, open_run

    online = config.name is TrackingName.wandb
    run = Run(name=name, run_id=run_id, group=group, job_type=job_type, recipe=recipe)
    with open_run(run, project=config.project, folder=folder, online=online) as sink:
        yield sink
