"""PEFT's LoRA folders without PEFT: read one module at a time, refused by name where a sum would be wrong, written.

Shape letters: I inputs and O outputs of the adapted layer, R lora_rank. The update is ΔW_OI = B_OR A_RI; for an
embedding, PEFT stores the factors of its transpose.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qlora_dist.errors import ModelError
from qlora_dist.model.adapter import ADAPTER_FILES, PROVENANCE_FILE, Provenance, read_provenance
from qlora_dist.model.tensorfile import TensorFile, TensorWriter
from qlora_dist.model.weights import read_json
from qlora_dist.runtime import write_json

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?:\.weight)?$",
)
_COPY = re.compile(r"^base_model\.model\.(?P<module>.+)\.base_layer\.(?P<what>weight|bias)$")
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PATTERN = r"(.*\.)?({key})$"  # as PEFT matches the keys of rank_pattern and alpha_pattern
_OTHER_FUNCTIONS = {
    "use_dora": "DoRA: its magnitudes make ΔW depend on the base, so that B A isn't the update",
    "lora_bias": "a bias on lora_B",
    "use_qalora": "QA-LoRA: its inputs are pooled",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "an activated LoRA (aLoRA): it acts on a part of the tokens alone",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA: its base is truncated",
    "monteclora_config": "MonteCLoRA: its factors are random",
    "layer_replication": "layer_replication: its base has other layers",
    "target_parameters": "target_parameters: its factors are of expert weights, not of linear layers",
    "trainable_token_indices": "trainable_token_indices: single rows of the embedding were replaced",
}


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank update ΔW = B A, any scale folded into B."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor

    @property
    def rank(self) -> int:
        """Returns the inner size of the product."""
        return self.A_RI.shape[0]

    def dense(self) -> torch.Tensor:
        """Returns ΔW_OI in float64. It is large: for tests and for tiny layers."""
        return self.B_OR.double() @ self.A_RI.double()


class PeftFolder:
    """A LoRA adapter on disk whose modules are read one at a time.

    `saved_modules` are the keys of layers that it brings whole. `base_copies` are keys, by the weight's name in the
    base, of what PEFT saved beside an adapted embedding or head: the base's own weight, as it was trained on.

    Raises:
        ModelError: if the folder holds no LoRA adapter, or one that isn't a plain sum W + s B A; by name.
    """

    def __init__(self, path: Path, label: str = "") -> None:
        self.path, self.label = path, label or path.name
        self.config = read_json(path / CONFIG_FILE, "a PEFT folder holds adapter_config.json")
        refuse_unmergeable(self.config, path)
        refuse_unreadable(self.config, path)
        if not (path / WEIGHTS_FILE).exists() and (path / "adapter_model.bin").exists():
            repair = "Save it once with `save_pretrained` of a current peft."
            raise ModelError(f"{path}: its weights are a pickle (adapter_model.bin), which runs code. {repair}")
        self.file = TensorFile(path / WEIGHTS_FILE)
        self._keys, others = self._sort_keys()
        copies = {key: match for key in others if (match := _COPY.match(key)) and match["module"] in self._keys}
        self.base_copies = {f"{match['module']}.{match['what']}": key for key, match in copies.items()}
        self.saved_modules = [key for key in others if key not in copies]
        self.provenance: Provenance | None = read_provenance(path) if (path / PROVENANCE_FILE).exists() else None

    @property
    def modules(self) -> list[str]:
        """Returns the names of the adapted layers in the base, in the file's order."""
        return list(self._keys)

    def keys(self, module: str) -> tuple[str, str]:
        """Returns the names of A and B of one module in the file."""
        return self._keys[module]

    def shape(self, module: str) -> tuple[int, int]:
        """Returns (O, I) of one adapted layer."""
        key_A, key_B = self._keys[module]
        return self.file.entries[key_B].shape[0], self.file.entries[key_A].shape[1]

    def rank(self, module: str) -> int:
        """Returns the lora_rank of one module."""
        return self.file.entries[self._keys[module][0]].shape[0]

    def scale(self, module: str) -> float:
        """Returns what PEFT multiplies B A by: alpha / r, or alpha / √r (rsLoRA, arXiv 2312.03732)."""
        rank = int(pattern_value(self.config.get("rank_pattern"), module, self.config["r"]))
        alpha = float(pattern_value(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        if rank != self.rank(module):
            wanted = f"r={rank} by {CONFIG_FILE}, r={self.rank(module)} by {WEIGHTS_FILE}"
            raise ModelError(f"{self.path}: {module} has {wanted}. The two files are not of one adapter.")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def factors(self, module: str) -> Factors:
        """Reads one module's factors as float32, its scale folded into B.

        Raises:
            ModelError: if a value is NaN or infinite.
        """
        A_RI, B_OR = (self.file.read(key).float() for key in self._keys[module])
        for key, values in zip(self._keys[module], (A_RI, B_OR), strict=True):
            if not torch.isfinite(values).all():
                raise ModelError(f"{self.path}: {key} holds NaN or infinite values. Train this adapter again.")
        return Factors(A_RI, B_OR * self.scale(module))

    def __enter__(self) -> PeftFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    def _sort_keys(self) -> tuple[dict[str, tuple[str, str]], list[str]]:
        found: dict[str, dict[str, str]] = {}
        saved: list[str] = []
        for key in self.file.entries:
            if match := _KEY.match(key):
                found.setdefault(match["module"], {})[match["factor"]] = key
            elif ".lora_" in key:
                what = f"{key} is no factor A or B: the adapter is of a kind of LoRA that isn't W + s B A"
                raise ModelError(f"{self.path}: {what}. It can't be merged in this way.")
            else:
                saved.append(key)
        for module, pair in found.items():
            if set(pair) != {"A", "B"} or any(len(self.file.entries[k].shape) != 2 for k in pair.values()):
                raise ModelError(
                    f"{self.path}: {module} has no two-dimensional pair of A and B: expected a linear layer."
                )
        if not found:
            raise ModelError(f"{self.path}: {WEIGHTS_FILE} holds no LoRA factors. Its training saved an empty adapter.")
        return {module: (pair["A"], pair["B"]) for module, pair in found.items()}, saved


def vocabulary(folder: Path) -> dict[str, Any] | None:
    """Returns the tokens of a folder's tokenizer.json, equal where two number them alike; None if there is none."""
    if not (path := folder / "tokenizer.json").is_file():
        return None
    fields = read_json(path, "a tokenizer is made from it")
    added = {token.get("content"): token.get("id") for token in fields.get("added_tokens") or []}
    return {"vocab": (fields.get("model") or {}).get("vocab"), "added": added}


def chat_template(folder: Path) -> str | None:
    """Returns the chat template in a folder, of its own file or of the tokenizer's; None where there is none."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    if not (path := folder / "tokenizer_config.json").is_file():
        return None
    told = read_json(path, "it lies beside a tokenizer").get("chat_template")
    return told if isinstance(told, str) else None


def refuse_unreadable(config: Mapping[str, Any], path: Path) -> None:
    """Refuses a config whose rank, alpha or patterns of them can't be used.

    Raises:
        ModelError: naming the field, its value and what was wanted.
    """
    repair = "Save the adapter again with peft."
    for field in ("r", "lora_alpha"):
        values = {field: config.get(field), **_pattern(config, field, path)}
        for name, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or (field == "r" and value <= 0):
                wanted = "a number above 0" if field == "r" else "a number"
                raise ModelError(f"{path / CONFIG_FILE}: {name}={value}: expected {wanted}. {repair}")


def _pattern(config: Mapping[str, Any], field: str, path: Path) -> dict[str, Any]:
    """Returns the values of `rank_pattern` or `alpha_pattern`, by their names in messages."""
    name = "rank_pattern" if field == "r" else "alpha_pattern"
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise ModelError(f"{path / CONFIG_FILE}: {name}={patterns}: expected an object. Save it again with peft.")
    for key in patterns:
        try:
            re.compile(_PATTERN.format(key=key))
        except re.error as error:
            wanted = f"regular expressions of module names ({error})"
            raise ModelError(f"{path / CONFIG_FILE}: {name}: {key}: expected {wanted}. Mend that key.") from None
    return {f"{name}.{key}": value for key, value in patterns.items()}


def refuse_unmergeable(config: Mapping[str, Any], path: Path) -> None:
    """Refuses adapters that aren't W + s B A on an unchanged base.

    Raises:
        ModelError: naming what makes the sum wrong.
    """
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type={config.get('peft_type')}: expected LORA. Other adapters are no B A.")
    for field, what in _OTHER_FUNCTIONS.items():
        if config.get(field):
            raise ModelError(
                f"{path}: {field}={config[field]}: the adapter has {what}. It can't be merged in this way."
            )
    if config.get("bias", "none") != "none":
        repair = "Train with bias='none'."
        raise ModelError(f"{path}: bias={config['bias']}: biases of the base were trained along. {repair}")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_BASE_CHANGING):
        repair = "Save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), which undoes that."
        raise ModelError(f"{path}: init_lora_weights={start}: the base was changed when training began. {repair}")


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that ends `module`, by PEFT's own rule, else `default`."""
    matches = (v for key, v in (patterns or {}).items() if re.match(_PATTERN.format(key=key), module))
    return next(matches, default)


class PeftWriter:
    """Writes a plain LoRA folder module by module: `lora_alpha` = r, no rsLoRA, so that ΔW is B A as stored.

    `template` lends the module names and what else its config says of the base; `owner` is the adapter that brings
    whole layers, if one does; `copies` are the parts' copies of the base, each with the adapter that has it.
    """

    def __init__(
        self,
        out: Path,
        template: PeftFolder,
        owner: PeftFolder | None = None,
        copies: Mapping[str, PeftFolder] | None = None,
    ) -> None:
        self.out, self._template, self._ranks = out, template, dict.fromkeys(template.modules, 0)
        self._owner = owner or template
        copies = dict.fromkeys(template.base_copies, template) if copies is None else copies
        self._whole = dict.fromkeys(self._owner.saved_modules, self._owner)
        self._whole |= {folder.base_copies[name]: folder for name, folder in copies.items()}
        names = [key for module in template.modules for key in template.keys(module)]
        self._file = TensorWriter(out / WEIGHTS_FILE, [*names, *self._whole])

    def add(self, module: str, factors: Factors, dtype: torch.dtype = torch.float32) -> None:
        """Appends one module's factors."""
        for key, values in zip(self._template.keys(module), (factors.A_RI, factors.B_OR), strict=True):
            self._file.add(key, values.to(dtype))
        self._ranks[module] = factors.rank

    def add_saved(self) -> None:
        """Appends the whole layers that the owner brings along (`modules_to_save`), and the copies of the base."""
        for key, folder in self._whole.items():
            self._file.add(key, folder.file.read(key))

    def __enter__(self) -> PeftWriter:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)
        if kind is None:
            write_json(self.out / CONFIG_FILE, self._config())

    def _config(self) -> dict[str, Any]:
        rank = Counter(self._ranks.values()).most_common(1)[0][0]
        # whole names: PEFT takes the first key that ends a module's name, and one name may end another
        other = {f"^{re.escape(module)}": r for module, r in self._ranks.items() if r != rank}
        plain = {"r": rank, "lora_alpha": rank, "rank_pattern": other, "alpha_pattern": other}
        rest = {"use_rslora": False, "init_lora_weights": True, "inference_mode": True, "lora_dropout": 0.0}
        saved = {"modules_to_save": self._owner.config.get("modules_to_save")}
        return {**self._template.config, **plain, **rest, **saved}
