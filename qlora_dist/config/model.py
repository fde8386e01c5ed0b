"""Which base model is fine-tuned, and how its weights are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qlora_dist.config.fields import execution, setting
from qlora_dist.errors import bad_value, nearest

ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention")
"""Attentions by transformers' names; `auto` is torch's own (`sdpa`) where an architecture has it, else `eager`."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""The form of a Hugging Face hub id: `name` or `owner/name`."""


class Quantization(Enum):
    """How the frozen base is stored: 4-bit NormalFloat, or as it is."""

    nf4 = "nf4"
    none = "none"


class Dtype(Enum):
    """The dtype of computation, and of storage where nothing is quantized."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class TinyConfig:
    """The embedded base: a Llama of a few million parameters, made on this machine from the `general` corpus."""

    vocab_size: int = setting(4096, at_least=300)
    hidden_size: int = setting(256, at_least=16)
    intermediate_size: int = setting(704, at_least=16)
    num_layers: int = setting(4, at_least=1)
    num_heads: int = setting(4, at_least=1)
    num_key_value_heads: int = setting(2, at_least=1)
    context_tokens: int = setting(256, at_least=32)
    pretrain_tokens: int = setting(360_000, at_least=0)
    tokens_per_step: int = setting(512, at_least=32)
    learning_rate: float = setting(2e-3, above=0)
    domain_sample_bytes: int = setting(200_000, at_least=0)
    seed: int = setting(17, at_least=0)

    def check(self, key: str) -> None:
        """Refuses shapes that attention can't split into heads."""
        if self.hidden_size % (2 * self.num_heads):
            wanted = f"a multiple of 2 x {key}.num_heads = {2 * self.num_heads}"
            raise bad_value(f"{key}.hidden_size", self.hidden_size, wanted)
        if self.num_heads % self.num_key_value_heads:
            raise bad_value(f"{key}.num_key_value_heads", self.num_key_value_heads, f"a divisor of {self.num_heads}")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model: `path` is a folder or a hub id; empty means the embedded one, described by `tiny`."""

    path: str = ""
    revision: str = ""
    quantization: Quantization = setting(Quantization.nf4)
    double_quant: bool = True
    compute_dtype: Dtype = setting(Dtype.bfloat16)
    attention: str = execution("auto")
    liger: bool = execution(False)
    tiny: TinyConfig = execution(TinyConfig)

    def check(self, key: str) -> None:
        """Refuses an unknown attention, and a base that would be another one tomorrow: a hub id without a full sha."""
        if self.attention not in ATTENTIONS:
            repair = nearest(self.attention, ATTENTIONS)
            raise bad_value(f"{key}.attention", self.attention, "an attention of transformers", repair)
        if not self.path or Path(self.path).expanduser().is_dir() or re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return
        if HUB_ID.fullmatch(self.path):
            wanted = f"the full commit sha of {self.path}, 40 hexadecimal digits, since no such folder is here"
            repair = f"Pin the one you mean from https://huggingface.co/{self.path}/commits/main."
            raise bad_value(f"{key}.revision", self.revision, wanted, repair)
        raise bad_value(f"{key}.path", self.path, "a folder that exists, or a hub id (owner/name)")
