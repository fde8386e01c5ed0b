"""A TensorBoard event file; the run's config stands in it as text, its recipe's key names the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_dist.errors import ConfigError
from qlora_dist.runtime import Made


class TensorboardSink:
    """A sink that writes each value as a scalar of its own."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table as Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)
        self.writer.add_text(name, table)
        self.writer.flush()

    def log_image(self, name: str, pixels_HWC: Any) -> None:
        """Writes an image."""
        self.writer.add_image(name, pixels_HWC, dataformats="HWC")
        self.writer.flush()

    def log_made(self, made: Made, made_from: Sequence[Made]) -> None:
        """Writes the keys of what was made and of its parents as a table: TensorBoard has no lineage of its own."""
        rows = [[m.stage, m.label, m.key, how] for m, how in [(made, "made"), *((m, "read") for m in made_from)]]
        self.log_table("lineage", ["stage", "label", "key", "how"], rows)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


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
