"""The weights of base + adapter, W + ΔW, block by block in float32.

Shape letters: I inputs and O outputs of a layer (a weight is O×I), R lora_rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from qlora_dist.errors import ModelError
from qlora_dist.export.architecture import read_architecture
from qlora_dist.export.nf4 import linear_weights, nf4_round_trip
from qlora_dist.model.peft_folder import Factors, PeftFolder
from qlora_dist.model.tensorfile import Entry, TensorFile
from qlora_dist.model.weights import find_weights, read_json
from qlora_dist.runtime import log

_COMPARED_VALUES = 2**20  # of two tensors at a time


class MergedWeights:
    """A base model's weight files with an adapter's updates beside them; nothing is held in memory.

    Args:
        base: a folder with config.json and safetensors files of 16 or 32 bits.
        adapter: what is added.
        as_nf4: add to what 4-bit training saw, dequant(NF4(W)), and not to the original weights.

    Where the adapter brings one end of a tied base whole, the ends are two from then on: `config` says so, and the
    other end is one of `names` even where the base's files hold it but once.

    Raises:
        ModelError: if the adapter has a layer that the base has not.
    """

    def __init__(self, base: Path, adapter: PeftFolder, *, as_nf4: bool = False) -> None:
        self.base, self.adapter = base, adapter
        self.config = read_json(base / "config.json", "a model folder holds config.json and *.safetensors")
        self._stack = ExitStack()
        self.files = {name: self._stack.enter_context(TensorFile(base / name)) for name in find_weights(base).files}
        self._file_of = {name: file for file in self.files.values() for name in file.entries}
        self._modules = {f"{module}.weight": module for module in adapter.modules}
        self._saved = {key.removeprefix("base_model.model."): key for key in adapter.saved_modules}
        self._twin_of: dict[str, str] = {}
        self._rounded = linear_weights(base) if as_nf4 else frozenset()
        self._architecture = read_architecture(base)
        self._check_modules()
        self._check_copies()
        self._drop_what_is_the_bases()
        self._untie()
        self._check_saved()

    @property
    def names(self) -> list[str]:
        """Returns the names of all weights, in the order of their files."""
        return [name for file in self.files.values() for name in self.names_in(file)]

    def names_in(self, file: TensorFile) -> list[str]:
        """Returns the weights that are written in place of one of the base's files."""
        return [*file.entries, *(name for name, twin in self._twin_of.items() if twin in file.entries)]

    @property
    def brought(self) -> list[str]:
        """Returns the names of the weights that the adapter brings whole."""
        return list(self._saved)

    @property
    def vocab_size(self) -> int:
        """Returns how many tokens the base knows."""
        return self._architecture.vocab_size

    @property
    def is_tied(self) -> bool:
        """Says whether embedding and head of what is written are one weight."""
        return self._architecture.is_tied and bool(self.config.get("tie_word_embeddings", True))

    def entry(self, name: str) -> Entry:
        """Returns dtype, shape and place of a weight in the base's file."""
        held = self._twin_of.get(name, name)
        return self._file_of[held].entries[held]

    def is_changed(self, name: str) -> bool:
        """Says whether the weight that is written differs from the base's file."""
        return any(name in some for some in (self._modules, self._saved, self._rounded, self._twin_of))

    def module(self, name: str) -> str | None:
        """Returns the adapted layer whose weight this is."""
        return self._modules.get(name)

    def update(self, name: str) -> Factors | None:
        """Returns ΔW as factors in the orientation in which the file holds W, None where nothing is added."""
        module = self._modules.get(name)
        if module is None:
            return None
        factors = self.adapter.factors(module)
        if self._is_transposed(module):
            return Factors(factors.B_OR.T.contiguous(), factors.A_RI.T.contiguous())
        return factors

    def base_rows(self, name: str) -> BaseRows:
        """Returns a reader of the rows of W in float32, before any update."""
        if name in self._saved:
            return BaseRows(self.adapter.file, self._saved[name])
        if name in self._rounded:
            return BaseRows(self._file_of[name], name, nf4_round_trip(self._file_of[name].read(name)))
        held = self._twin_of.get(name, name)
        return BaseRows(self._file_of[held], held)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one whole weight, update included, in float32."""
        entry = self.entry(name)
        whole = self.base_rows(name).read(0, entry.num_rows).reshape(entry.shape)
        if (update := self.update(name)) is not None:
            whole.addmm_(update.B_OR, update.A_RI)
        return whole

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every weight, update included, in float32."""
        for name in self.names:
            yield name, self.tensor(name)

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _is_transposed(self, module: str) -> bool:
        """Says whether the base holds this layer's weight as I×O; the layer's class says it, not the adapter's flag."""
        is_embedding = "lora_embedding" in self.adapter.keys(module)[0]
        return is_embedding or f"{module}.weight" in self._architecture.transposed

    def _check_modules(self) -> None:
        for name, module in self._modules.items():
            if self._architecture.is_tied and name in self._architecture.ends:
                repair = "Use the adapter unmerged, or train without it in target_modules."
                raise ModelError(
                    f"{self.adapter.path}: adapts {module}, which this base ties to its other end. {repair}"
                )
            if name not in self._file_of:
                raise self._no_such(f"adapts {module}", name)
            shape = self.adapter.shape(module)
            wanted = tuple(reversed(shape)) if self._is_transposed(module) else shape
            if self.entry(name).shape != wanted:
                found = f"{name} is {self.entry(name).shape} in {self.base}, {wanted} in {self.adapter.path}"
                raise ModelError(f"{found}. The adapter is of another base.")

    def _no_such(self, what: str, name: str) -> ModelError:
        """Builds the complaint about a weight that the base's files lack, or hold under another name."""
        known = self._architecture.weights
        if name in known and 2 * sum(held in known for held in self._file_of) < len(self._file_of):
            found = f"{self._architecture.name} names its weights otherwise in its files, {next(iter(self._file_of))}"
            repair = "Use the adapter unmerged, or merge it with peft's merge_and_unload."
            return ModelError(f"{self.adapter.path}: {what}; {found}, and isn't exported here. {repair}")
        return ModelError(f"{self.adapter.path}: {what}, but {self.base} has no {name}. Another base?")

    def _check_copies(self) -> None:
        for name, key in self.adapter.base_copies.items():
            if not self._is_the_bases(name, key):
                what = f"was saved with a {name} of its own, which isn't that of {self.base}"
                repair = "Give the base that it was trained on; if tokens were added, its save_pretrained with them."
                raise ModelError(f"{self.adapter.path}: {what}. {repair}")

    def _drop_what_is_the_bases(self) -> None:
        """Leaves out what PEFT saved whole though it wasn't trained: the base's own embedding or head."""
        self._saved = {name: key for name, key in self._saved.items() if not self._is_the_bases(name, key)}

    def _is_the_bases(self, name: str, key: str) -> bool:
        """Says whether a tensor of the adapter is the base's, as it is or rounded to the adapter's dtype."""
        held = name if name in self._file_of else self._other_end(name)
        theirs = self.adapter.file.entries[key]
        if held not in self._file_of or self.entry(held).shape != theirs.shape:
            return False
        step = max(1, _COMPARED_VALUES * theirs.num_rows // max(1, math.prod(theirs.shape)))
        for first in range(0, theirs.num_rows, step):
            last = min(first + step, theirs.num_rows)
            ours = self._file_of[held].read_rows(held, first, last)
            if not torch.equal(ours.to(theirs.dtype), self.adapter.file.read_rows(key, first, last)):
                return False
        return True

    def _other_end(self, name: str) -> str:
        """Returns the end of a tied base that is one with this one, the name itself for any other weight."""
        first, last = self._architecture.ends
        return {first: last, last: first}.get(name, name) if self._architecture.is_tied else name

    def _untie(self) -> None:
        """Makes two weights of a tied base's ends if the adapter brings one of them, or both with different values."""
        brought = [end for end in self._architecture.ends if end in self._saved]
        if not self._architecture.is_tied or not brought:
            return
        if len(brought) == 2 and self._are_one(*(self._saved[end] for end in brought)):
            for end in brought:
                if end not in self._file_of:
                    del self._saved[end]
            return
        for end in self._architecture.ends:
            if end not in self._file_of:
                self._twin_of[end] = self._other_end(end)
        self.config = self.config | {"tie_word_embeddings": False}
        other = [end for end in self._architecture.ends if end not in brought]
        told = f"brings {' and '.join(brought)}" + (f" but not {other[0]}" if other else ", which differ")
        log.warning("%s: %s: what the base ties is written as two weights.", self.adapter.path, told)

    def _are_one(self, first: str, other: str) -> bool:
        return torch.equal(self.adapter.file.read(first), self.adapter.file.read(other))

    def _check_saved(self) -> None:
        for name, key in self._saved.items():
            if name not in self._file_of and name not in self._twin_of:
                raise self._no_such(f"brings {name}", name)
            if self.entry(name).shape != (found := self.adapter.file.entries[key].shape):
                shown = f"brings {name} as {found}, which is {self.entry(name).shape} in {self.base}"
                raise ModelError(f"{self.adapter.path}: {shown}. Was it trained on a base with other tokens?")


class BaseRows:
    """Reads rows of one weight in float32, from its file or from memory; threads may share it."""

    def __init__(self, file: TensorFile, name: str, whole: torch.Tensor | None = None) -> None:
        self._file, self._name, self._whole = file, name, whole

    def read(self, first: int, last: int) -> torch.Tensor:
        """Returns rows `first` to `last` (left out), in memory of their own."""
        if self._whole is not None:
            return self._whole[first:last].to(torch.float32, copy=True)
        return self._file.read_rows(self._name, first, last).float()

    def read_into(self, first: int, last: int, raw: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns the same in `values` (float32), read through `raw` (uint8): no memory is asked for."""
        found = (
            self._whole[first:last] if self._whole is not None else self._file.read_rows(self._name, first, last, raw)
        )
        return values[: found.numel()].view(found.shape).copy_(found)
