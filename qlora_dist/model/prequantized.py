"""The pre-quantized base: quantized once (stage `base`), then read, whole or by each rank its part.

The folder is one that `AutoModelForCausalLM.from_pretrained` loads too. This reader is faster, since it quantizes
nothing and copies each byte once, and it is the only one that reads a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.errors import ModelError
from qlora_dist.model.kernels import attention_of
from qlora_dist.model.packing import keep_segments_apart
from qlora_dist.model.quantize import keep_cpu_weights
from qlora_dist.model.tensorfile import TensorFile, TensorWriter
from qlora_dist.runtime import device

if TYPE_CHECKING:
    from qlora_dist.model.base import Base

FOLDER, WEIGHTS_FILE = "nf4", "model.safetensors"
_STATE = ".weight.quant_state.bitsandbytes__nf4"
_STATE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


def storage_of(model: ModelConfig) -> str:
    """Returns in words what a pre-quantized base and a recipe must agree on; nothing where nothing is quantized."""
    if model.quantization is not Quantization.nf4:
        return ""
    return f"nf4 {'double' if model.double_quant else 'single'} {model.compute_dtype.name}"


def write_prequantized(model: Any, folder: Path) -> int:
    """Writes a loaded 4-bit model as a Hugging Face folder of packed weights; returns the bytes of the weights."""
    folder.mkdir(exist_ok=True)
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        place = (value.data_ptr(), value.shape)
        if value.numel() and place in seen:
            continue  # tied: the head is the embedding
        seen.add(place)
        tensors[name] = value
    with TensorWriter(folder / WEIGHTS_FILE, tensors) as writer:
        for name, value in tensors.items():
            writer.add(name, value)
    model.config.save_pretrained(str(folder))
    return (folder / WEIGHTS_FILE).stat().st_size


def build_skeleton(base: Base, model: ModelConfig) -> Any:
    """Builds the base without its weights: 4-bit layers where the pre-quantized file has them, parameters of size 0.

    Raises:
        ModelError: if the base was not pre-quantized in the storage that `model` asks for.
    """
    import bitsandbytes as bnb
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if not is_stored(base, model):
        raise ModelError(f"{base.path}: no pre-quantized weights of {storage_of(model)}. Run stage `base` for it.")
    dtype = getattr(torch, model.compute_dtype.name)
    config = AutoConfig.from_pretrained(base.prequantized)
    with init_empty_weights(include_buffers=False):
        attention = attention_of(model, config)
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with TensorFile(Path(base.prequantized) / WEIGHTS_FILE) as file:
        quantized = [name.removesuffix(_STATE) for name in file.entries if name.endswith(_STATE)]
    for name in quantized:
        layer = skeleton.get_submodule(name)
        with torch.device("meta"):
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_storage=dtype
            )
        packed.weight = bnb.nn.Params4bit(torch.empty(0, dtype=dtype), quant_storage=dtype, bnb_quantized=True)
        skeleton.set_submodule(name, packed)
    for name, module in skeleton.named_modules():
        module.stored_as = name
    skeleton.is_loaded_in_4bit = True
    skeleton.config.use_cache = False
    keep_cpu_weights(skeleton)
    return keep_segments_apart(skeleton).requires_grad_(False)


class PrequantizedReader:
    """Fills a skeleton from its file, whatever wrapping its modules were given since it was built."""

    def __init__(self, base: Base) -> None:
        self._file = TensorFile(Path(base.prequantized) / WEIGHTS_FILE)

    def __enter__(self) -> PrequantizedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fill(self, model: Any) -> None:
        """Reads every parameter whole onto this rank's device, and the quantization states with them."""
        import bitsandbytes as bnb

        for module, name, own in self._parameters(model):
            value = self._file.read(own).to(device())
            if state := self._give_state(module, name, own):
                weight = bnb.nn.Params4bit(
                    value, quant_state=state, quant_storage=value.dtype, bnb_quantized=True, module=module
                )
                module._parameters[name] = weight
            else:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        self.settle(model)

    def fill_module(self, module: nn.Module) -> None:
        """Reads one module's own parameters as plain ones, its children's not; `settle` is due after the last."""
        for owner, name, own in self._parameters(module):
            if owner is module:
                module._parameters[name] = nn.Parameter(self._file.read(own).to(device()), requires_grad=False)
                self._give_state(module, name, own)

    def settle(self, model: Any) -> None:
        """Ties what is tied, and moves the buffers, which no file holds, to the device."""
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device())
        model.tie_weights()

    def shape_on_meta(self, model: Any) -> None:
        """Gives every parameter its stored shape and no memory, so that it can be divided before it is read."""
        for module, name, own in self._parameters(model):
            entry = self._file.entries[own]
            empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            self._give_state(module, name, own)
        self.settle(model)

    def fill_parts(self, model: Any) -> None:
        """Reads this rank's part of every divided parameter, and nothing else of it."""
        for module, name, own in self._parameters(model):
            module._parameters[name] = nn.Parameter(self._part(own, module._parameters[name]), requires_grad=False)
        self.settle(model)

    def _parameters(self, model: nn.Module) -> Iterator[tuple[Any, str, str]]:
        """Yields (module, parameter, its name in the file); tied ones stand in the file once."""
        for module in model.modules():
            stored_as = getattr(module, "stored_as", None)
            for name in list(module._parameters) if stored_as is not None else ():
                if f"{stored_as}.{name}" in self._file.entries:
                    yield module, name, f"{stored_as}.{name}"

    def _give_state(self, module: Any, name: str, own: str) -> Any:
        """Reads a 4-bit layer's scales and gives them to the layer; returns nothing for other parameters."""
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Linear4bit

        if name != "weight" or not isinstance(module, Linear4bit):
            return None
        keys = [f"{own}.{part}" for part in _STATE_PARTS]
        parts = {key.removeprefix(f"{own}."): self._file.read(key) for key in keys if key in self._file.entries}
        module.quant_state = QuantState.from_dict(parts, device=device())
        return module.quant_state

    def _part(self, own: str, parameter: Any) -> torch.Tensor:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = parameter.device_mesh, parameter.placements
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        local = self._file.read_rows(own, offset[0], offset[0] + shape[0]).to(device())
        whole = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(local, mesh, placements, **whole)


def load_prequantized(base: Base, model: ModelConfig) -> Any:
    """Loads the whole base from its pre-quantized file, with the bits that quantizing it on the fly gives."""
    skeleton = build_skeleton(base, model)
    with PrequantizedReader(base) as reader:
        reader.fill(skeleton)
    return skeleton


def load_frozen(base: Base, model: ModelConfig) -> Any:
    """Loads the base in the quickest way there is: its pre-quantized file, else quantized while it is read."""
    from qlora_dist.model.base import load_model

    return load_prequantized(base, model) if is_stored(base, model) else load_model(base, model)


def is_stored(base: Base, model: ModelConfig) -> bool:
    """Says whether the base was pre-quantized in the storage that `model` asks for."""
    return base.storage != "" and base.storage == storage_of(model)
