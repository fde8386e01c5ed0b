"""Models to be scored: one base stays loaded in a process, and adapters come and go on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_dist.config.fields import everything
from qlora_dist.config.stages import ScoresConfig
from qlora_dist.runtime import log

_loaded: dict[str, Any] = {}
"""The last base that was loaded, by what it is and how; a process that scores several models loads it once."""


@contextmanager
def open_scored_model(config: ScoresConfig, inputs: Mapping[str, Path]) -> Iterator[Any]:
    """Yields the base, the base with the adapter on it, or the fine-tuned model in its place.

    Raises:
        ModelError: if the adapter belongs to another base.
    """
    from qlora_dist.model.adapter import load_adapter
    from qlora_dist.model.base import describe_base, load_model, open_base

    if config.full and "adapter" in inputs:
        _loaded.clear()  # two whole models may not fit
        tuned = inputs["adapter"]
        yield load_model(describe_base(tuned, str(tuned), ""), config.model, quantized=False)
        return
    base = open_base(inputs["base"])
    model = _load_once(f"{base.digest} {everything(config.model)}", lambda: load_model(base, config.model))
    if "adapter" not in inputs:
        yield model
        return
    adapted = load_adapter(model, inputs["adapter"], base)
    try:
        yield adapted
    finally:
        adapted.unload()  # takes the factors off again; the base's own weights were never touched


def _load_once(key: str, load: Any) -> Any:
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load()
    else:
        log.info("the base is loaded already")
    return _loaded[key]
