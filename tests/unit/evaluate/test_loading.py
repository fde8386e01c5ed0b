from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.stages import ScoresConfig
from qlora_dist.evaluate import loading
from qlora_dist.evaluate.scores import score_model

from .models import model_config, random_rows, save_base, save_lora


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts how often a base is really loaded."""
    from qlora_dist.model import base

    counted: list[str] = []
    load = base.load_model

    def counting(described: Any, *args: Any, **more: Any) -> Any:
        counted.append(described.digest)
        return load(described, *args, **more)

    monkeypatch.setattr(base, "load_model", counting)
    loading._loaded.clear()
    return counted


def score(root: Path, base: Path, name: str, adapter: Path | None = None) -> list[float]:
    out = root / f"scores-{name}"
    out.mkdir(exist_ok=True)
    inputs = {"base": base, "rows-legal": root / "legal", **({"adapter": adapter} if adapter else {})}
    facts = score_model(ScoresConfig(model=model_config(base.parent), name=name), inputs, out)
    return [row["value"] for row in facts["scores"] if row["metric"] == "bits_per_byte"]


def test_many_models_are_scored_on_one_loaded_base_as_each_alone(tmp_path: Path, loads: list[str]) -> None:
    base = save_base(tmp_path)
    random_rows(tmp_path / "legal")
    adapters = {name: save_lora(base, tmp_path / name, seed=i) for i, name in enumerate("abc")}
    first = score(tmp_path, base, "base")
    together = {name: score(tmp_path, base, name, folder) for name, folder in adapters.items()}
    assert score(tmp_path, base, "base") == first, "no adapter leaves a trace on the base"
    assert len(loads) == 1
    for name, folder in adapters.items():
        loading._loaded.clear()
        assert score(tmp_path, base, name, folder) == together[name] != first


def test_another_base_takes_the_first_ones_place(tmp_path: Path, loads: list[str]) -> None:
    random_rows(tmp_path / "legal")
    bases = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        bases.append(save_base(tmp_path / str(seed), seed=seed))
    values = [score(tmp_path, base, "base") for base in bases]
    assert values[0] != values[1]
    assert len(set(loads)) == 2
    assert len(loading._loaded) == 1, "memory holds one base"
