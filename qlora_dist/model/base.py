"""The frozen base model: found, checked, described once (stage `base`), and loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.config.stages import BaseConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.kernels import attention_of
from qlora_dist.model.lora import refuse_transposed
from qlora_dist.model.packing import keep_segments_apart
from qlora_dist.model.prequantized import FOLDER, storage_of, write_prequantized
from qlora_dist.model.weights import find_weights, folder_digest, read_json
from qlora_dist.runtime import Facts, log, write_json

if TYPE_CHECKING:
    import torch

BASE_FILE = "base.json"


@dataclass(frozen=True, slots=True)
class Base:
    """What a base model is: where it lies, the digest of its bytes, and its shape.

    `storage` says how its pre-quantized copy is stored ("" where there is none), `prequantized` in which folder.
    """

    path: str
    revision: str
    digest: str
    architecture: str
    num_parameters: int
    vocab_size: int
    num_layers: int
    hidden_size: int
    max_position_embeddings: int
    dtype: str
    storage: str = ""
    prequantized: str = ""

    def folder(self) -> Path:
        """Returns the local folder that holds the files: the path itself, or the hub's cache."""
        return model_folder(self.path, self.revision)


def prepare_base(config: BaseConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Checks the base model, writes `base.json`, which says what it is, and quantizes it once for all that follows.

    The base is `model.path`, or the folder of input `tiny` when that is empty.

    Raises:
        ModelError: if the folder holds no model that can be loaded, naming the file and the repair, or one whose layers
            can't be stored in 4 bits.
    """
    path = config.model.path or str(inputs["tiny"])
    folder = model_folder(path, config.model.revision)
    base = describe_base(folder, str(folder) if Path(path).expanduser().is_dir() else path, config.model.revision)
    facts = asdict(base)
    if storage := storage_of(config.model):
        started = time.monotonic()
        refuse_transposed(_empty_model(folder))
        num_bytes = write_prequantized(load_model(base, config.model), out / FOLDER)
        log.info("quantized %s in %.1f s: %.2f GB", base.path, time.monotonic() - started, num_bytes / 1e9)
        facts |= {"storage": storage, "prequantized_bytes": num_bytes}
    write_json(out / BASE_FILE, facts)
    return facts


def open_base(folder: Path) -> Base:
    """Reads the description that stage `base` wrote into `folder`."""
    fields = read_json(folder / BASE_FILE, "run stage `base` first")
    known = {name: fields[name] for name in Base.__dataclass_fields__ if name in fields}
    return Base(**known | {"prequantized": str(folder / FOLDER) if known.get("storage") else ""})


def model_folder(path: str, revision: str) -> Path:
    """Returns the local folder of a model: `path` itself, or the snapshot of a hub id at a pinned revision.

    Raises:
        ConfigError: for a folder that is absent, and a hub id without a full commit sha.
        ModelError: for a hub id that can't be fetched.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    ModelConfig(path=path, revision=revision).check("model")
    return _snapshot(path, revision)


def _snapshot(path: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, local_files_only=True))
    except Exception:
        log.info("fetching %s at %s", path, revision)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        repair = "Check the id, the revision, HF_TOKEN for a gated model, and the network; or set a local folder."
        raise ModelError(f"model.path={path}: the hub gives no revision {revision} ({first}). {repair}") from None


def describe_base(folder: Path, path: str, revision: str) -> Base:
    """Returns what the model in `folder` is, after reading its config and every weight file's header.

    Raises:
        ModelError: as `find_weights`, and for an architecture that transformers doesn't know.
    """
    fields = read_json(folder / "config.json", "a model folder holds config.json and *.safetensors")
    weights = find_weights(folder)
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "?")
        raise ModelError(f"{folder}: its weights are quantized already ({method}). Set model.path to the 16-bit model.")
    shape = _shape(folder, fields)
    return Base(
        path=path,
        revision=revision,
        digest=folder_digest(folder, ["config.json", *weights.files]),
        num_parameters=weights.num_parameters,
        dtype=weights.dtype,
        **shape,
    )


def _shape(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = fields.get("model_type", "")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        wanted = "a causal language model that the installed transformers knows (llama, qwen3, mistral ...)"
        raise ModelError(f"{folder / 'config.json'}: model_type={kind!r}: expected {wanted}.")
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()  # a model of images too describes its decoder apart
    return {
        "architecture": (getattr(config, "architectures", None) or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]])[0],
        "vocab_size": int(text.vocab_size),
        "num_layers": int(text.num_hidden_layers),
        "hidden_size": int(text.hidden_size),
        "max_position_embeddings": int(getattr(text, "max_position_embeddings", None) or 0),
    }


def _empty_model(folder: Path) -> Any:
    """Returns the model of a folder without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def no_progress_bars() -> None:
    """Turns off the bars and advice that transformers and bitsandbytes write while they load and save."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_model(base: Base, model: ModelConfig, *, dtype: torch.dtype | None = None, quantized: bool = True) -> Any:
    """Loads the base as a Hugging Face causal language model on this rank's device, 4-bit if the config says so.

    Args:
        base: what to load.
        model: how its weights are stored and which attention runs.
        dtype: of what is not quantized, instead of `model.compute_dtype`.
        quantized: False keeps the weights whole whatever `model.quantization` says (full fine-tuning).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_dist.model.quantize import bits_and_bytes, keep_cpu_weights
    from qlora_dist.runtime import device

    no_progress_bars()
    four_bit = quantized and model.quantization is Quantization.nf4
    loaded = AutoModelForCausalLM.from_pretrained(
        base.folder(),
        dtype=dtype or getattr(torch, model.compute_dtype.name),
        quantization_config=bits_and_bytes(model) if four_bit else None,
        attn_implementation=attention_of(model, AutoConfig.from_pretrained(base.folder(), local_files_only=True)),
        device_map={"": device()},
        local_files_only=True,
    )
    keep_cpu_weights(loaded)
    loaded.config.use_cache = False
    return keep_segments_apart(loaded)
