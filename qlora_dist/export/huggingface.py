"""A base and an adapter become one model folder, shard by shard and in blocks of rows: memory stays small.

Each weight gets one float32 sum and one rounding. `gain` is the share of ΔW that survives it,
⟨stored − W, ΔW⟩ / ‖ΔW‖²: rounding to 16 bits is a bias and not only noise, since an update far smaller than the
spacing of the weight's floats leaves most of them where they were.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from qlora_dist.errors import ModelError
from qlora_dist.export.weights import BaseRows, MergedWeights
from qlora_dist.model.peft_folder import Factors, chat_template
from qlora_dist.model.tensorfile import Entry, TensorFile, lay_out, write_bytes
from qlora_dist.model.threads import one_thread_each
from qlora_dist.model.weights import INDEX_FILE, read_json
from qlora_dist.runtime import Progress, write_json

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_BLOCK_VALUES = 2**18  # of one block of rows: a few copies of it in float32 stay in a core's cache
_MEASURED_VALUES = 2**18  # of each layer at least, some rows of each block: enough for its gain, at little work
_COPY_BYTES = 2**23
_TENSORS_AT_ONCE = 2  # the next one's factors are read while the blocks of this one are worked on
_SKIPPED_SUFFIXES = (".jsonl", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(slots=True)
class Gain:
    """How much of one layer's ΔW the stored weights hold."""

    survived: float = 0.0
    energy: float = 0.0
    base_energy: float = 0.0

    def __add__(self, other: Gain) -> Gain:
        return Gain(self.survived + other.survived, self.energy + other.energy, self.base_energy + other.base_energy)

    @property
    def share(self) -> float:
        """Returns 1 where all of ΔW is there, 0 where rounding ate it."""
        return self.survived / self.energy if self.energy else 1.0

    @property
    def size(self) -> float:
        """Returns ‖ΔW‖ / ‖W‖."""
        return float((self.energy / self.base_energy) ** 0.5) if self.base_energy else 0.0


def write_model(
    weights: MergedWeights, out: Path, dtype: torch.dtype | None = None, workers: int = 0
) -> dict[str, Gain]:
    """Writes the merged model with the base's own files, and returns the gain of each adapted layer.

    Args:
        weights: base and adapter.
        out: an empty folder.
        dtype: of all floating-point weights; None leaves each as it is in the base.
        workers: threads over blocks of rows; 0 is one a core.
    """
    with one_thread_each(workers or os.cpu_count() or 1) as pool:
        writer = _ShardWriter(weights, dtype, pool, Progress(len(weights.names), "tensor"))
        for name, file in weights.files.items():
            writer.write(file, out / name)
    copy_other_files(weights.base, out)
    if (template := chat_template(weights.adapter.path)) is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {k: v for k, v in weights.config.items() if k not in ("dtype", "torch_dtype")} if dtype else weights.config
    write_json(out / "config.json", config | ({"dtype": str(dtype).removeprefix("torch.")} if dtype else {}))
    _write_index(weights, out)
    return writer.gains


@dataclass(slots=True)
class _ShardWriter:
    """Writes one weight file after the other, its blocks side by side on the threads of `pool`."""

    weights: MergedWeights
    dtype: torch.dtype | None
    pool: ThreadPoolExecutor
    progress: Progress
    gains: dict[str, Gain] = field(default_factory=dict)

    def write(self, file: TensorFile, path: Path) -> None:
        shapes = {name: self.weights.entry(name) for name in self.weights.names_in(file)}
        header, entries = lay_out({n: (self._stored(e.dtype), e.shape) for n, e in shapes.items()}, file.metadata)
        aside = path.with_name(f".{path.name}.partial")
        with aside.open("wb") as target:
            target.write(header)
            target.truncate(max((e.start + e.num_bytes for e in entries.values()), default=len(header)))
            target.flush()
            written = (
                (name, self._start_tensor(file, name, entry, target.fileno())) for name, entry in entries.items()
            )
            waiting = deque(islice(written, _TENSORS_AT_ONCE))
            while waiting:
                self._finish_tensor(*waiting.popleft())
                waiting.extend(islice(written, 1))
        aside.replace(path)

    def _stored(self, found: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and found.is_floating_point else found

    def _start_tensor(self, file: TensorFile, name: str, entry: Entry, target: int) -> list[Future[Gain]]:
        was = self.weights.entry(name)
        if not self.weights.is_changed(name) and entry.dtype == was.dtype:
            starts = range(0, was.num_bytes, _COPY_BYTES)
            return [self.pool.submit(_copy_block, file, was, done, target, entry.start) for done in starts]
        rows, update = self.weights.base_rows(name), self.weights.update(name)
        slot = _Slot(name, entry, target)
        share = _MEASURED_VALUES / max(1, math.prod(entry.shape))
        return [self.pool.submit(_write_block, rows, update, slot, block, share) for block in _row_blocks(entry)]

    def _finish_tensor(self, name: str, jobs: list[Future[Gain]]) -> None:
        gain = sum((job.result() for job in jobs), Gain())
        if (module := self.weights.module(name)) is not None:
            self.gains[module] = gain
        self.progress.update(self.progress.done + 1)


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of one weight in the file that is being written."""

    name: str
    entry: Entry
    target: int

    def write(self, values: torch.Tensor, first_row: int) -> torch.Tensor:
        num_bytes = values.numel() * self.entry.dtype.itemsize
        data = _scratch.take("stored", num_bytes, torch.uint8).view(self.entry.dtype).view(values.shape).copy_(values)
        if self.entry.dtype is torch.float16 and bool((data.isinf() & values.isfinite()).any()):
            raise too_large(self.name)
        start = self.entry.start + first_row * (self.entry.num_bytes // max(self.entry.num_rows, 1))
        write_bytes(self.target, data.reshape(-1).view(torch.uint8), start)
        return data


def too_large(name: str) -> ModelError:
    """Builds the complaint about a weight that float16 can't hold."""
    largest = f"{torch.finfo(torch.float16).max:g}"
    return ModelError(f"{name}: holds values beyond {largest}, the largest of f16. Export as bf16 or f32.")


class _Scratch(threading.local):
    """Memory that a thread uses again for each block: fresh pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns a flat tensor of `size` values, what it holds left over from before."""
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=dtype)
        return self._buffers[name][:size]


_scratch = _Scratch()


def _copy_block(file: TensorFile, entry: Entry, done: int, target: int, start: int) -> Gain:
    file.copy_bytes(entry.start + done, min(_COPY_BYTES, entry.num_bytes - done), target, start + done)
    return Gain()


def _row_blocks(entry: Entry) -> Iterator[tuple[int, int]]:
    row_values = max(1, math.prod(entry.shape) // max(entry.num_rows, 1))
    step = max(1, _BLOCK_VALUES // row_values)
    for first in range(0, entry.num_rows, step):
        yield first, min(first + step, entry.num_rows)


def _write_block(
    rows: BaseRows, update: Factors | None, slot: _Slot, block: tuple[int, int], measured_share: float
) -> Gain:
    """Writes a block of rows of a weight, and returns the gain of the first ones of them."""
    first, last = block
    size = (last - first) * (slot.entry.num_bytes // slot.entry.dtype.itemsize // slot.entry.num_rows)
    raw, values = _scratch.take("raw", 8 * size, torch.uint8), _scratch.take("values", size, torch.float32)
    base = rows.read_into(first, last, raw, values)
    if update is None:
        slot.write(base, first)
        return Gain()
    B_OR = update.B_OR[first:last]
    measured = slice(min(last - first, math.ceil((last - first) * measured_share)))
    before, added = base[measured].clone(), B_OR[measured] @ update.A_RI
    stored = slot.write(base.addmm_(B_OR, update.A_RI), first)[measured].float()
    return Gain(_inner(stored.sub_(before), added), _inner(added, added), _inner(before, before))


def _inner(x_XY: torch.Tensor, y_XY: torch.Tensor) -> float:
    return float(torch.dot(x_XY.reshape(-1), y_XY.reshape(-1)))


def copy_other_files(base: Path, out: Path) -> None:
    """Copies tokenizer, chat template, generation config and all else that isn't weights."""
    for path in sorted(base.iterdir()):
        skipped = path.suffix in _SKIPPED_SUFFIXES or path.name.endswith(".index.json") or path.name.startswith(".")
        if path.is_file() and not skipped and path.name not in ("base.json", "manifest.json"):
            shutil.copyfile(path, out / path.name)


def _write_index(weights: MergedWeights, out: Path) -> None:
    if not (weights.base / INDEX_FILE).exists():
        return
    index = read_json(weights.base / INDEX_FILE, "download the model again")
    sizes = (e.num_bytes for name in weights.files for e in _entries(out / name).values())
    index["metadata"] = index.get("metadata", {}) | {"total_size": sum(sizes)}
    index["weight_map"] = {n: file for file, held in weights.files.items() for n in weights.names_in(held)}
    write_json(out / INDEX_FILE, index)


def _entries(path: Path) -> dict[str, Entry]:
    with TensorFile(path) as file:
        return file.entries
