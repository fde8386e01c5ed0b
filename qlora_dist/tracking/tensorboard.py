"""A TensorBoard event file; the run's config stands in it as text, its recipe's key names the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_dist.errors import ConfigError


class TensorboardSink:
    """A sink that writes each value as a scalar of its own."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


@contextmanager
def open_board(folder: Path, run_id: str, recipe: Mapping[str, Any]) -> Iterator[TensorboardSink]:
    """Opens `folder/tensorboard/<run_id>`; a requeued job adds a file there, and the curves join.

    Raises:
        ConfigError: if TensorBoard isn't installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        repair = "Install it with: pip install 'qlora_dist[tensorboard]'."
        raise ConfigError(f"tracking=tensorboard: {error}. {repair}") from error
    with SummaryWriter(str(folder / "tensorboard" / run_id)) as writer:
        writer.add_text("config", f"```json\n{json.dumps(dict(recipe), indent=2)}\n```")
        yield TensorboardSink(writer)
