"""What is shipped besides the PEFT folder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import setting
from qlora_dist.errors import bad_value


class ExportFormat(Enum):
    """The file format of an exported model: nothing, a Hugging Face folder, a GGUF model, or a GGUF LoRA file."""

    none = "none"
    hf = "hf"
    gguf = "gguf"
    gguf_lora = "gguf_lora"


class ExportDtype(Enum):
    """How an export stores weights; `base` is as the base does (float32 for a LoRA file)."""

    base = "base"
    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"
    q8_0 = "q8_0"


class ExportBase(Enum):
    """What ΔW is added to: the original weights, or what 4-bit training saw of them."""

    original = "original"
    nf4 = "nf4"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The format of the export; `none` ships the PEFT folder alone.

    `tokenizer_pre` is llama.cpp's name of the pre-tokenizer, where it isn't found out.
    """

    format: ExportFormat = setting(ExportFormat.none)
    dtype: ExportDtype = setting(ExportDtype.base)
    base_as: ExportBase = setting(ExportBase.original)
    tokenizer_pre: str = ""

    def check(self, key: str) -> None:
        """Refuses 8 bits for formats that have none."""
        if self.dtype is ExportDtype.q8_0 and self.format is not ExportFormat.gguf:
            raise bad_value(f"{key}.dtype", "q8_0", f"bf16, f16 or f32 with {key}.format={self.format.name}")
