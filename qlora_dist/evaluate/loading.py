"""Models to be scored: one base stays loaded in a process, and adapters stand on it side by side, switched by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.config.fields import everything
from qlora_dist.config.stages import ScoresConfig
from qlora_dist.errors import ModelError, QloraDistError
from qlora_dist.runtime import log

_loaded: dict[str, Any] = {}
"""The last base that was loaded, by what it is and how; a process that scores several models loads it once."""

UNADAPTED = "__base__"
"""What PEFT calls the base itself, where each row of a batch names its adapter."""


Inputs = Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Task:
    """One model to be scored: what it is told, what it reads, where it writes, and the lane of its trackers."""

    label: str
    config: ScoresConfig
    inputs: Inputs
    out: Path
    lane: str = ""

    @property
    def asked(self) -> str:
        """Names what is asked of it and on which base: all but the adapter; a whole fine-tuned model stays alone."""
        told = {name: value for name, value in everything(self.config).items() if name != "name"}
        read = sorted(item for item in self.inputs.items() if item[0] != "adapter")
        return f"{told} {read} {self.label if self.config.full else ''}"


@dataclass(slots=True)
class Models:
    """Models on one loaded base: the network, PEFT's name of each one's adapter, and the errors of those left out."""

    network: Any
    adapter_names: dict[str, str] = field(default_factory=dict)
    failed: dict[str, QloraDistError] = field(default_factory=dict)

    def is_adapted(self, label: str) -> bool:
        """Says whether a model is more than the base."""
        return self.adapter_names[label] != UNADAPTED

    def only(self, label: str) -> AbstractContextManager[Any]:
        """Makes the network be one of the models, inside the `with` block."""
        if self.is_adapted(label):
            self.network.set_adapter(self.adapter_names[label])
            return nullcontext()
        has_adapters = hasattr(self.network, "disable_adapter")
        return self.network.disable_adapter() if has_adapters else nullcontext()


@contextmanager
def open_models(tasks: Sequence[Task]) -> Iterator[Models]:
    """Yields the models of tasks that are `asked` the same, on one loaded base.

    A model whose adapter can't be loaded is left out, and stands in `failed`. A fully fine-tuned model takes the
    place of the base, and comes alone.

    Raises:
        ModelError: if the base can't be loaded.
    """
    from qlora_dist.model.base import describe_base, load_model, open_base

    first = tasks[0]
    if first.config.full and "adapter" in first.inputs:
        assert len(tasks) == 1, "two whole models may not fit"
        _loaded.clear()
        tuned = first.inputs["adapter"]
        network = load_model(describe_base(tuned, str(tuned), ""), first.config.model, quantized=False)
        yield Models(network, {first.label: UNADAPTED})
        return
    base = open_base(first.inputs["base"])
    told = first.config.model
    network = _load_once(f"{base.digest} {everything(told)}", lambda: load_model(base, told))
    models = _with_adapters(Models(network), base, {task.label: task.inputs.get("adapter") for task in tasks})
    try:
        yield models
    finally:
        if models.network is not network:
            models.network.unload()  # takes the factors off again; the base's own weights were never touched


def _with_adapters(models: Models, base: Any, folders: Mapping[str, Path | None]) -> Models:
    from qlora_dist.model.adapter import load_adapter

    for number, (label, folder) in enumerate(folders.items()):
        if folder is None:
            models.adapter_names[label] = UNADAPTED
            continue
        name = f"model_{number}"  # a label may hold dots, a module's name may not
        try:
            _check_readable(folder)
            models.network = load_adapter(models.network, folder, base, name)
            models.adapter_names[label] = name
        except QloraDistError as error:
            models.failed[label] = error
    return models


def _check_readable(folder: Path) -> None:
    """Refuses an adapter that PEFT would fail on half-way, with some of its layers on the base already.

    Raises:
        ModelError: if one of its files can't be read.
    """
    from peft import PeftConfig
    from safetensors import safe_open

    from qlora_dist.model.adapter import ADAPTER_FILES

    try:
        PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / ADAPTER_FILES[1], "pt") as tensors:
            tensors.keys()
    except Exception as error:
        raise ModelError(f"{folder}: this adapter can't be read ({error}). Train or copy it anew.") from error


def _load_once(key: str, load: Any) -> Any:
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load()
    else:
        log.info("the base is loaded already")
    return _loaded[key]
