"""Safetensors files, read and written one tensor at a time.

The reader uses `pread`, not `mmap`: pages of a mapped file count as resident memory, and a merge of eight
large adapters would look (and, under a memory limit, fail) as if it held them all. Several threads may read
from one file at once. The writer needs no shapes beforehand: it leaves room for the header and fills it in last.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

import torch

from qlora_dist.errors import ModelError, disk_error

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' name of each dtype that is read and written here."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY_BYTES = 160  # one header entry without its tensor's name: dtype, up to eight sizes, two offsets


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies in its file: `start` is counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Returns the size of the first dimension; a single value is one row."""
        return self.shape[0] if self.shape else 1


class TensorFile:
    """A safetensors file that is read tensor by tensor, from any number of threads.

    Raises:
        ModelError: if the file is absent, torn, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"{path}: can't be read ({error.strerror}).") from None
        self.header_bytes, self.metadata, self.entries = self._read_header()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading from it afterwards fails."""
        os.close(self._file)

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor in memory of its own, in the dtype of the file."""
        entry = self.entries[name]
        buffer = self.read_bytes(entry.start, entry.num_bytes)
        return buffer.view(entry.dtype).reshape(entry.shape)

    def read_rows(self, name: str, first: int, last: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Returns rows `first` to `last` (left out) of a tensor's first dimension, in `buffer` (uint8) if given."""
        entry = self.entries[name]
        row_bytes = entry.num_bytes // max(entry.num_rows, 1)
        data = self.read_bytes(entry.start + first * row_bytes, (last - first) * row_bytes, buffer)
        return data.view(entry.dtype).reshape(last - first, *entry.shape[1:])

    def read_bytes(self, start: int, num_bytes: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Returns bytes of the file as a uint8 tensor, the first ones of `buffer` if given."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8) if buffer is None else buffer[:num_bytes]
        view, done = buffer.numpy().data, 0
        while done < num_bytes:
            done += (got := os.preadv(self._file, [view[done : done + 2**30]], start + done))
            if not got:
                raise ModelError(f"{self.path}: ends after {start + done} bytes. The file is torn: copy it again.")
        return buffer

    def copy_bytes(self, start: int, num_bytes: int, target: int, at: int) -> None:
        """Copies bytes of the file to the open file `target`, inside the kernel where the system can."""
        done = 0
        try:
            while done < num_bytes:
                if not (copied := os.copy_file_range(self._file, target, num_bytes - done, start + done, at + done)):
                    break
                done += copied
        except (AttributeError, OSError):  # not on this system, or not between these file systems
            pass
        if done < num_bytes:
            write_bytes(target, self.read_bytes(start + done, num_bytes - done), at + done)

    def _read_header(self) -> tuple[int, dict[str, str], dict[str, Entry]]:
        size = os.fstat(self._file).st_size
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if not 2 <= length <= size - 8:
            raise ModelError(f"{self.path}: no safetensors file, or a torn one ({size} bytes). Copy it again.")
        try:
            header: dict[str, Any] = json.loads(bytes(self.read_bytes(8, length).numpy()))
        except ValueError:
            raise ModelError(f"{self.path}: the header is no JSON. Copy the file again.") from None
        if not isinstance(header, dict):
            raise ModelError(f"{self.path}: the header is a {type(header).__name__}, no object. Copy the file again.")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ModelError(f"{self.path}: the header's __metadata__ is no object. Copy the file again.")
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        end = max((e.start + e.num_bytes for e in entries.values()), default=8 + length)
        if end > size:
            raise ModelError(f"{self.path}: has {size} of {end} bytes. The file is torn: copy it again.")
        return 8 + length, metadata, entries

    def _entry(self, name: str, value: Mapping[str, Any], offset: int) -> Entry:
        try:
            kind, shape = str(value["dtype"]), tuple(map(int, value["shape"]))
            first, last = map(int, value["data_offsets"])
        except (KeyError, TypeError, ValueError):
            wanted = "its dtype, shape and two data_offsets"
            raise ModelError(f"{self.path}: the header doesn't say of {name} {wanted}. Copy the file again.") from None
        if kind not in DTYPES:
            raise ModelError(f"{self.path}: {name} has dtype {kind}, which is not read here.")
        if first < 0 or last - first != math.prod(shape) * DTYPES[kind].itemsize:
            raise ModelError(f"{self.path}: {name} has not the bytes of its shape {shape}. Copy the file again.")
        return Entry(DTYPES[kind], shape, offset + first, last - first)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Yields a path that becomes `out`, a file or a folder, if the block ends well: `out` is whole or absent.

    The path is in a new folder beside `out` that no other process knows, so two who write to one `out` don't meet;
    the later one is refused.

    Raises:
        ModelError: if `out` is there already, or can't be.
        ArtifactError: if the disk is full.
    """
    try:
        _refuse_existing(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        repair = "Choose another place."
        raise ModelError(f"--out={out}: can't be made in {out.parent} ({error.strerror}). {repair}") from None
    try:
        yield aside / out.name
        _refuse_existing(out)
        (aside / out.name).rename(out)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            _refuse_existing(out)  # another process was quicker
        known = disk_error(error, out) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise known or error from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ModelError(f"--out={out}: is there already. Choose another name, or remove it.")


def write_bytes(target: int, values: torch.Tensor, at: int) -> None:
    """Writes a uint8 tensor to the open file `target`, at a place of its own."""
    view, done = values.numpy().data, 0
    while done < len(view):
        done += os.pwrite(target, view[done:], at + done)


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """Returns the header of a file that holds `tensors` in their order, and where each one lies in it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    done, offsets = 0, {}
    for name, (dtype, shape) in tensors.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [done, done + num_bytes]}
        offsets[name] = (done, num_bytes)
        done += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    room = -(-(len(text) + 8) // 64) * 64 - 8
    entries = {n: Entry(*tensors[n], 8 + room + start, num_bytes) for n, (start, num_bytes) in offsets.items()}
    return room.to_bytes(8, "little") + text.ljust(room), entries


class TensorWriter:
    """Writes a safetensors file tensor by tensor, aside, and renames it into place when the block ends well.

    `names` are the tensors that will come, so that the header's room is known.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        room = len(json.dumps(self._header)) + sum(len(name.encode()) + _ENTRY_BYTES for name in names)
        self._room = -(-(room + 8) // 64) * 64 - 8  # tensor data start on a 64-byte boundary
        self._aside = path.with_name(f".{path.name}.partial")
        self._file = self._aside.open("wb")
        self._file.seek(8 + self._room)
        self._done = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends one tensor to the file."""
        data = tensor.detach().contiguous().cpu()
        num_bytes = data.numel() * data.element_size()
        offsets = [self._done, self._done + num_bytes]
        self._header[name] = {"dtype": _NAMES[data.dtype], "shape": list(data.shape), "data_offsets": offsets}
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._done += num_bytes

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            header = json.dumps(self._header, separators=(",", ":")).encode()
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        if kind is None:
            self._aside.replace(self.path)
        else:
            self._aside.unlink()
