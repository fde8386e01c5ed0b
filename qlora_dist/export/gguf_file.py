"""GGUF files: the merged model, or the adapter alone for llama.cpp to add at load time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors are written one after the other, so that
memory holds one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dist.errors import ModelError
from qlora_dist.export.gguf_architecture import add_shape, gguf_arch, gguf_name, permuted, rope_factors, tensor_names
from qlora_dist.export.gguf_tokenizer import add_tokenizer
from qlora_dist.export.huggingface import Gain, too_large
from qlora_dist.export.weights import MergedWeights
from qlora_dist.model.peft_folder import PeftFolder, chat_template

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK_VALUES = 2**22
_MEASURED_ROWS = 256  # of each layer at least: enough for its gain


def write_gguf(weights: MergedWeights, out: Path, dtype: str, pre: str = "") -> dict[str, Gain]:
    """Writes base + adapter as one GGUF file, and returns the gain of each adapted layer.

    Args:
        weights: base and adapter.
        out: the file.
        dtype: bf16, f16, f32 or q8_0, for all but vectors, which stay float32.
        pre: llama.cpp's name of the pre-tokenizer, where it isn't found out.

    Raises:
        ModelError: for an architecture or a tokenizer that llama.cpp has no equal of.
    """
    import gguf

    names = tensor_names(weights.config)
    with _writer(out, weights.config) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(weights.base.name)
        add_shape(writer, weights.config)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        size = int(weights.config["vocab_size"])
        add_tokenizer(writer, weights.base, size, pre, chat_template(weights.adapter.path))
        sources: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
        if (factors := rope_factors(weights.config)) is not None:
            sources["rope_freqs.weight"] = (tuple(factors.shape), lambda: factors)
        whose: dict[str, str] = {}
        for name in weights.names:
            if not name.endswith("rotary_emb.inv_freq"):
                read = _reader(weights, name)
                sources[gguf_name(names, name)] = (weights.entry(name).shape, read)
                whose[gguf_name(names, name)] = name
        gains: dict[str, Gain] = {}

        def seen(name: str, values: np.ndarray[Any, Any], stored: np.ndarray[Any, Any], kind: Any) -> None:
            if name in whose and (module := weights.module(whose[name])) is not None:
                gains[module] = _gain(weights, whose[name], values, stored, kind)

        _write_tensors(writer, sources, dtype, seen)
    return gains


def write_gguf_lora(weights: MergedWeights, out: Path, dtype: str = "f32") -> None:
    """Writes the adapter alone as a GGUF LoRA file: A as it is, B with llama.cpp's order of rows, scale folded in.

    llama.cpp multiplies by `adapter.lora.alpha` / r, and knows one alpha a file. Ours is set so that the files of
    rsLoRA, of rank and alpha patterns and of merges all come out right: B carries what alpha / r doesn't.

    Raises:
        ModelError: for an architecture that llama.cpp has no equal of, or layers that an adapter brings whole.
    """
    import gguf

    adapter, config = weights.adapter, weights.config
    if weights.brought:
        raise ModelError(f"{adapter.path}: brings {weights.brought[0]} whole; a LoRA file can't. Use --to gguf.")
    if any("lora_embedding" in adapter.keys(module)[0] for module in adapter.modules):
        raise ModelError(f"{adapter.path}: adapts an embedding, which llama.cpp's LoRA files can't. Use --to gguf.")
    names = tensor_names(config)
    alpha = float(max(adapter.rank(module) for module in adapter.modules))
    with _writer(out, config) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(adapter.label)
        sources: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
        for module in adapter.modules:
            (num_out, num_in), rank = adapter.shape(module), adapter.rank(module)
            name = gguf_name(names, f"{module}.weight")
            sources[f"{name}.lora_a"] = ((rank, num_in), _factor(adapter, module, config, "A", alpha))
            sources[f"{name}.lora_b"] = ((num_out, rank), _factor(adapter, module, config, "B", alpha))
        _write_tensors(writer, sources, dtype)


def _reader(weights: MergedWeights, name: str) -> Callable[[], torch.Tensor]:
    return lambda: permuted(weights.config, name, weights.tensor(name))


def _factor(
    adapter: PeftFolder, module: str, config: dict[str, Any], factor: str, alpha: float
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        factors = adapter.factors(module)
        if factor == "A":
            return factors.A_RI
        return permuted(config, module, factors.B_OR * (factors.rank / alpha))

    return read


@contextmanager
def _writer(out: Path, config: dict[str, Any]) -> Iterator[Any]:
    """Yields a GGUF writer of a file beside `out`, which becomes `out` if the block ends well."""
    import gguf

    logging.getLogger("gguf").setLevel(logging.ERROR)
    arch = gguf.MODEL_ARCH_NAMES[gguf_arch(config)]
    aside = out.with_name(f".{out.name}.partial")
    writer = gguf.GGUFWriter(aside, arch)
    try:
        yield writer
        writer.close()
        aside.replace(out)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)


def _write_tensors(
    writer: Any,
    sources: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]],
    dtype: str,
    seen: Callable[[str, np.ndarray[Any, Any], np.ndarray[Any, Any], Any], None] | None = None,
) -> None:
    import gguf

    for name, (shape, _) in sources.items():
        kind = _kind(shape, dtype)
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            native = np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32
            size = int(np.prod(shape)) * np.dtype(native).itemsize
            writer.add_tensor_info(name, shape, np.dtype(native), size)
        else:
            byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (shape, read) in sources.items():
        values, kind = read().contiguous().numpy(), _kind(shape, dtype)
        stored = _encode(name, values, kind)
        if seen is not None:
            seen(name, values, stored, kind)
        writer.write_tensor_data(stored)


def _gain(
    weights: MergedWeights, name: str, values: np.ndarray[Any, Any], stored: np.ndarray[Any, Any], kind: Any
) -> Gain:
    """Returns how much of ΔW is in the rows that were stored, measured on some of them, evenly spread."""
    import gguf

    update = weights.update(name)
    assert update is not None
    rows = slice(None, None, max(1, values.shape[0] // _MEASURED_ROWS))
    added = permuted(weights.config, name, update.B_OR)[rows] @ update.A_RI
    merged = torch.from_numpy(values[rows])
    kept = torch.from_numpy(gguf.quants.dequantize(stored[rows], kind).astype(np.float32))
    base = merged - added
    energy, base_energy = float(added.square().sum()), float(base.square().sum())
    return Gain(float(((kept - base) * added).sum()), energy, base_energy)


def _kind(shape: tuple[int, ...], dtype: str) -> Any:
    """Returns how a tensor is stored: vectors in float32, and in float16 what 8-bit blocks of 32 can't hold."""
    import gguf

    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[dtype.upper()]


def _encode(name: str, values: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    """Returns the bytes of a tensor, made block by block."""
    import gguf

    if kind == gguf.GGMLQuantizationType.F32:
        return values
    if kind == gguf.GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
        if bool((np.isinf(stored) & np.isfinite(values)).any()):
            raise too_large(name)
        return stored
    encoded = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), dtype=np.uint8)
    step = max(1, _BLOCK_VALUES // values.shape[-1])
    for first in range(0, values.shape[0], step):
        encoded[first : first + step] = gguf.quants.quantize(values[first : first + step], kind)
    return encoded
