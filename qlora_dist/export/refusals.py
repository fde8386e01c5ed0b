"""What can't be exported is told by the base's small files alone, and so before anything is trained or merged."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_dist.config.export import ExportConfig, ExportFormat
from qlora_dist.config.model import ModelConfig
from qlora_dist.errors import ModelError, bad_value
from qlora_dist.export.gguf_architecture import refuse_architecture
from qlora_dist.export.gguf_tokenizer import refuse_tokenizer
from qlora_dist.model.weights import read_json


def refuse_export(model: ModelConfig, export: ExportConfig) -> None:
    """Refuses an export that would fail in the end; of a base that isn't on this machine yet only what is known.

    Raises:
        ModelError: for quantized weights, and where GGUF is asked for, for an architecture or a tokenizer that
            llama.cpp has no equal of, or a missing package; with the repair.
    """
    folder = Path(model.path).expanduser()
    if export.format in (ExportFormat.gguf, ExportFormat.gguf_lora):
        refuse_without_gguf(export.format.name)
    refuse_unused(export.format.name, export.tokenizer_pre)
    if export.format is ExportFormat.none or not model.path or not folder.is_dir():
        return
    config = read_json(folder / "config.json", "a model folder holds config.json and *.safetensors")
    refuse_base(config, folder, export.format.name, export.tokenizer_pre)


def refuse_base(config: Mapping[str, Any], base: Path, form: str, tokenizer_pre: str) -> None:
    """Refuses a base that can't be exported to a format, by its small files alone.

    Raises:
        ConfigError: for a pre-tokenizer that llama.cpp doesn't know.
        ModelError: for quantized weights, and an architecture or a tokenizer that llama.cpp has no equal of.
    """
    form = form.replace("_", "-")
    refuse_quantized(config, base, form)
    if form in ("gguf", "gguf-lora"):
        refuse_architecture(config)
    if form == "gguf":
        refuse_tokenizer(base, tokenizer_pre, int(config["vocab_size"]))


def refuse_unused(form: str, tokenizer_pre: str) -> None:
    """Refuses the name of a pre-tokenizer where no tokenizer is written that would bear it.

    Raises:
        ConfigError: naming both.
    """
    if tokenizer_pre and form not in ("gguf", "none"):
        wanted = f"nothing with {form.replace('_', '-')}: gguf files alone name a pre-tokenizer"
        raise bad_value("export.tokenizer_pre", tokenizer_pre, wanted)


def refuse_quantized(config: Mapping[str, Any], base: Path, form: str) -> None:
    """Refuses a base whose stored weights are quantized: what is added would be rounded away.

    Raises:
        ModelError: naming the quantization.
    """
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        bits = " (4-bit)" if quantization.get("load_in_4bit") else ""
        why = "Rounding the sum to 4 bits keeps 2 to 4 % of an adapter"
        if form == "gguf-lora":
            why = "Whether the adapter's layers fit is told by whole weights, which these files don't hold"
        repair = "Give the 16-bit original as base, or ship the adapter unmerged."
        raise ModelError(f"{base}: its weights are quantized by {method}{bits}. {why}. {repair}")


def refuse_without_gguf(form: str) -> None:
    """Refuses a GGUF export where the package that writes such files isn't installed.

    Raises:
        ModelError: with the command that installs it.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"{form.replace('_', '-')} needs the package gguf: pip install 'qlora_dist[gguf]'.")
