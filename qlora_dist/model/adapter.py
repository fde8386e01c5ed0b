"""An adapter folder: PEFT's own two files, and `qlora_dist.json`, which says what base it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.errors import ModelError
from qlora_dist.model.weights import read_json
from qlora_dist.runtime import write_json

if TYPE_CHECKING:
    from qlora_dist.model.base import Base

PROVENANCE_FILE = "qlora_dist.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What an adapter was trained on: its base and tokenizer by content, how many tokens, to which held-out loss."""

    base_path: str
    base_revision: str
    base_digest: str
    tokenizer_digest: str
    quantization: str
    dtype: str
    trained_tokens: int
    validation_loss: float | None = None


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Writes `qlora_dist.json` beside the adapter's own files."""
    write_json(folder / PROVENANCE_FILE, asdict(provenance))


def read_provenance(folder: Path) -> Provenance:
    """Reads what an adapter was trained on.

    Raises:
        ModelError: if the folder isn't an adapter of this project.
    """
    fields = read_json(folder / PROVENANCE_FILE, "an adapter folder made by qlora_dist holds it")
    try:
        return Provenance(**fields)
    except TypeError as error:
        raise ModelError(f"{folder / PROVENANCE_FILE}: not as this version writes it ({error}).") from None


def check_adapter(folder: Path, base: Base) -> Provenance:
    """Returns the adapter's provenance if it belongs to `base`.

    Raises:
        ModelError: if a file is absent, or the adapter was trained on another base, naming both.
    """
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}, so this is no adapter folder.")
    provenance = read_provenance(folder)
    if provenance.base_digest != base.digest:
        theirs = f"{provenance.base_path} (digest {provenance.base_digest[:12]})"
        ours = f"{base.path} (digest {base.digest[:12]})"
        raise ModelError(f"{folder}: this adapter was trained on {theirs}, not on {ours}. Give it its own base.")
    return provenance


def load_adapter(model: Any, folder: Path, base: Base, name: str = "default") -> Any:
    """Returns `model` with the adapter of `folder` on it, frozen, after checking that it belongs to `base`.

    A model that has adapters already gets one more, called `name`.
    """
    from peft import PeftModel

    from qlora_dist.model.quantize import keep_cpu_weights

    check_adapter(folder, base)
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    keep_cpu_weights(model)
    return model


def save_adapter(model: Any, folder: Path, base: Base) -> None:
    """Writes a PEFT model's adapter as PEFT's two files and nothing else, with the same bytes for the same values."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    settle_adapter_config(folder / ADAPTER_FILES[0], base)
    (folder / ADAPTER_FILES[1]).chmod(0o644)  # safetensors files are born 0600


def settle_adapter_config(path: Path, base: Base) -> None:
    """Rewrites `adapter_config.json` with its lists sorted (PEFT writes sets in hash order) and its base named."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields = {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}
    fields |= {"base_model_name_or_path": base.path, "revision": base.revision or None}
    write_json(path, fields)
