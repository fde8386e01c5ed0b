"""What every process needs and no room owns: rank, seeds, devices, progress, metrics, quiet libraries.

Torch is imported inside the functions that need it: data stages start without it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

Facts = dict[str, Any]
"""What a stage function returns: plain JSON values that stand in its artifact's manifest."""

PROGRESS_VARIABLE = "QLORA_DIST_PROGRESS"
"""Names the file in which a node leaves its latest progress for the launcher."""

ELASTIC_VARIABLE = "QLORA_DIST_ELASTIC"
"""Says that this job was meant to have another number of processes than its plan says."""

log = logging.getLogger("qlora_dist")


def rank() -> int:
    """Returns this process's global rank, 0 outside `torchrun`."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes of this job, 1 outside `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns this process's rank on its own node, 0 outside `torchrun`."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def peak_resident_bytes() -> int:
    """Returns the most memory that this process held since it began to run its program.

    The system's own `ru_maxrss` starts from what the process that started this one held: beneath a large one it
    tells that one's size.
    """
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def local_world_size() -> int:
    """Returns the number of this job's processes on this node, 1 outside `torchrun`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device() -> torch.device:
    """Returns this rank's GPU where there is one, else the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch, so that the same seed gives the same bytes on one machine."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def quiet_libraries() -> None:
    """Turns off the progress bars, telemetry and advice of the libraries below; their errors still raise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    for module in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")


def write_json(path: Path, value: object) -> None:
    """Writes `value` aside and renames it into place, so that no reader sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(path)


def clear(folder: Path) -> None:
    """Empties a folder of what a killed life left there; hidden files (who owns it) stay."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@dataclass(slots=True)
class Progress:
    """Tells how far a node is: to the launcher's live table twice a second, to the log every ten seconds."""

    total: int
    unit: str = "step"
    done: int = 0
    started: float = 0.0
    _written: float = 0.0
    _logged: float = 0.0
    _done_at_start: int = 0

    def update(self, done: int, **values: float) -> None:
        """Records that `done` of `total` units are finished, with the latest `values` (loss, tokens_per_s ...)."""
        now = time.monotonic()
        if not self.started:
            self.started, self._done_at_start = now, done
        self.done = done
        last = done >= self.total
        if (last or now - self._written > 0.5) and rank() == 0:
            self._written = now
            self._write(values)
        if (last or now - self._logged > 10) and rank() == 0:
            self._logged = now
            shown = " ".join(f"{k} {v:.4g}" for k, v in values.items())
            log.info("%s %d/%d %s, %.0f s left", self.unit, done, self.total, shown, self.left_s())

    def left_s(self) -> float:
        """Returns the seconds left at the mean speed so far."""
        new = self.done - self._done_at_start
        return (time.monotonic() - self.started) / new * (self.total - self.done) if new > 0 else 0.0

    def _write(self, values: Mapping[str, float]) -> None:
        file = os.environ.get(PROGRESS_VARIABLE)
        if file:
            state = {"done": self.done, "total": self.total, "unit": self.unit, "left_s": self.left_s(), **values}
            write_json(Path(file), state)


class Sink(Protocol):
    """A place where metrics go: a file, W&B, TensorBoard."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of one step."""


@runtime_checkable
class TableSink(Protocol):
    """A sink that takes tables too."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records one table."""


@dataclass(frozen=True, slots=True)
class Made:
    """A finished artifact as trackers know it: what it is, its recipe's key, its manifest, and what was found of it."""

    stage: str
    label: str
    key: str
    manifest: Path
    facts: Facts


@runtime_checkable
class ImageSink(Protocol):
    """A sink that takes images too."""

    def log_image(self, name: str, pixels_HWC: Any) -> None:
        """Records one image, uint8 [height, width, 3]."""


@runtime_checkable
class LineageSink(Protocol):
    """A sink that takes lineage too."""

    def log_made(self, made: Made, made_from: Sequence[Made]) -> None:
        """Records what was made, and of what."""


class JsonlSink:
    """A sink that appends one JSON object a step to a file, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends `{"step": step, ...values}` as one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


_sinks: dict[str, list[Sink]] = {}
"""The open sinks, by the lane whose values they take; "" where there is but one."""


@contextmanager
def sinks(*added: Sink, lane: str = "") -> Iterator[None]:
    """Sends what `log_metrics` is given for `lane` to these sinks too, inside the `with` block."""
    opened = _sinks.setdefault(lane, [])
    opened.extend(added)
    try:
        yield
    finally:
        for sink in added:
            opened.remove(sink)


def log_metrics(step: int, values: Mapping[str, float], lane: str = "") -> None:
    """Sends the values of one step to every open sink of `lane`, from rank 0 alone."""
    if rank() == 0:
        for sink in _sinks.get(lane, []):
            sink.log(step, values)


def log_table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], lane: str = "") -> None:
    """Sends a table to every open sink of `lane` that takes tables, from rank 0 alone."""
    if rank() == 0:
        for sink in _sinks.get(lane, []):
            if isinstance(sink, TableSink):
                sink.log_table(name, columns, rows)


def log_image(name: str, pixels_HWC: Any, lane: str = "") -> None:
    """Sends an image to every open sink of `lane` that takes images, from rank 0 alone."""
    if rank() == 0:
        for sink in _sinks.get(lane, []):
            if isinstance(sink, ImageSink):
                sink.log_image(name, pixels_HWC)


def log_made(made: Made, made_from: Sequence[Made], lane: str = "") -> None:
    """Sends a finished artifact and its parents to every open sink of `lane` that takes lineage, from rank 0 alone."""
    if rank() == 0:
        for sink in _sinks.get(lane, []):
            if isinstance(sink, LineageSink):
                sink.log_made(made, made_from)
