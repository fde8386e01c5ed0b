"""The files of a model folder: which hold the weights, whether they are whole, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The safetensors files of a model, and what their headers say."""

    files: list[str]
    num_parameters: int
    dtype: str


def read_json(path: Path, repair: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: if the file is absent or no JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file: {repair}.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read as JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(fields).__name__}.")
    return fields


def find_weights(folder: Path) -> WeightFiles:
    """Returns the weight files of a model folder, every header read and every length checked.

    Raises:
        ModelError: if there are none, one is missing or torn, or they are pickles.
    """
    files = _listed_files(folder)
    sizes: dict[str, int] = {}
    for name in files:
        for dtype, count in _read_header(folder / name):
            sizes[dtype] = sizes.get(dtype, 0) + count
    if not sizes:
        raise ModelError(f"{folder}: its weight files hold no tensor. Download the model again.")
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return WeightFiles(files=files, num_parameters=sum(sizes.values()), dtype=most)


def _listed_files(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).exists():
        index = read_json(folder / INDEX_FILE, "download the model again")
        return sorted(set(index.get("weight_map", {}).values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        repair = "Save it once with `save_pretrained` of a current transformers"
        raise ModelError(f"{folder}: its weights are pickles (*.bin), which run code when opened. {repair}.")
    raise ModelError(f"{folder}: no weights (model.safetensors or {INDEX_FILE}). Download the model again.")


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def _read_header(path: Path) -> list[tuple[str, int]]:
    """Returns (dtype, number of values) of each tensor, from the file's header alone; safetensors checks its length."""
    from safetensors import SafetensorError, safe_open

    found = []
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                view = file.get_slice(name)
                count = 1
                for size in view.get_shape():
                    count *= size
                found.append((_DTYPES.get(view.get_dtype(), view.get_dtype()), count))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file, though {INDEX_FILE} names it. Download the model again.") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: torn or no safetensors file ({error}). Download the model again.") from None
    return found


def folder_digest(folder: Path, files: Iterable[str]) -> str:
    """Returns the sha256 over the names and bytes of `files`, in sorted order: the content, not the place."""
    whole = hashlib.sha256()
    for name in sorted(set(files)):
        with (folder / name).open("rb") as file:
            part = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{name}\0{part}\n".encode())
    return whole.hexdigest()


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def tokenizer_digest(folder: Path) -> str:
    """Returns the digest of a tokenizer's vocabulary files.

    Raises:
        ModelError: if the folder holds none of them.
    """
    files = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        raise ModelError(f"{folder}: no tokenizer ({', '.join(TOKENIZER_FILES)}).")
    return folder_digest(folder, files)
