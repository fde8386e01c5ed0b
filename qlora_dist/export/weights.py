"""The weights of base + adapter, W + ΔW, block by block in float32.

Shape letters: I inputs and O outputs of a layer (a weight is O×I), R lora_rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from qlora_dist.errors import ModelError
from qlora_dist.export.nf4 import linear_weights, nf4_round_trip
from qlora_dist.export.refusals import refuse_quantized
from qlora_dist.model.peft_folder import Factors, PeftFolder
from qlora_dist.model.tensorfile import Entry, TensorFile
from qlora_dist.model.weights import find_weights, read_json

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


class MergedWeights:
    """A base model's weight files with an adapter's updates beside them; nothing is held in memory.

    Args:
        base: a folder with config.json and safetensors files of 16 or 32 bits.
        adapter: what is added.
        as_nf4: add to what 4-bit training saw, dequant(NF4(W)), and not to the original weights.

    Raises:
        ModelError: if the base is quantized, or the adapter has a layer that the base has not.
    """

    def __init__(self, base: Path, adapter: PeftFolder, *, as_nf4: bool = False) -> None:
        self.base, self.adapter = base, adapter
        self.config = read_json(base / "config.json", "a model folder holds config.json and *.safetensors")
        refuse_quantized(self.config, base)
        self._stack = ExitStack()
        self.files = {name: self._stack.enter_context(TensorFile(base / name)) for name in find_weights(base).files}
        self._file_of = {name: file for file in self.files.values() for name in file.entries}
        self._modules = {f"{module}.weight": module for module in adapter.modules}
        self._saved = {key.removeprefix("base_model.model."): key for key in adapter.saved_modules}
        self._rounded = linear_weights(base, self.config) if as_nf4 else frozenset()
        self._check()

    @property
    def names(self) -> list[str]:
        """Returns the names of all weights, in the order of their files."""
        return list(self._file_of)

    def entry(self, name: str) -> Entry:
        """Returns dtype, shape and place of a weight in its file."""
        return self._file_of[name].entries[name]

    def is_changed(self, name: str) -> bool:
        """Says whether the weight that is written differs from the base's file."""
        return name in self._modules or name in self._saved or name in self._rounded

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
        return BaseRows(self._file_of[name], name)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one whole weight, update included, in float32."""
        whole = self.base_rows(name).read(0, self.entry(name).shape[0])
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
        is_embedding = "lora_embedding" in self.adapter.keys(module)[0]
        return is_embedding or bool(self.adapter.config.get("fan_in_fan_out"))

    def _check(self) -> None:
        tied = bool(self.config.get("tie_word_embeddings"))
        for name, module in self._modules.items():
            is_end = module.endswith("lm_head") or module.rsplit(".", 1)[-1] in _EMBEDDINGS
            if tied and is_end:
                repair = "Use the adapter unmerged, or train without it in target_modules."
                raise ModelError(
                    f"{self.adapter.path}: adapts {module}, which this base ties to its other end. {repair}"
                )
            if name not in self._file_of:
                raise ModelError(f"{self.adapter.path}: adapts {module}, but {self.base} has no {name}. Another base?")
            shape = self.adapter.shape(module)
            wanted = tuple(reversed(shape)) if self._is_transposed(module) else shape
            if self.entry(name).shape != wanted:
                found = f"{name} is {self.entry(name).shape} in {self.base}, {wanted} in {self.adapter.path}"
                raise ModelError(f"{found}. The adapter is of another base.")
        for name, key in self._saved.items():
            if name not in self._file_of or self.entry(name).shape != self.adapter.file.entries[key].shape:
                raise ModelError(f"{self.adapter.path}: brings {name}, which has no place of its shape in {self.base}.")


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
