from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.config.stages import ScoresConfig
from qlora_dist.errors import QloraDistError
from qlora_dist.evaluate import held_out, loading
from qlora_dist.evaluate.scores import score_model, score_models
from qlora_dist.model.base import open_base
from qlora_dist.runtime import Facts

from .models import model_config, random_rows, save_base, save_lora, save_trained_lora


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


def jointly(root: Path, base: Path, folders: Mapping[str, Path | None]) -> dict[str, Facts | QloraDistError]:
    configs = {label: ScoresConfig(model=model_config(base.parent), name=label) for label in folders}
    given = {"base": base, "rows-legal": root / "legal", "rows-general": root / "general"}
    inputs = {label: given | ({"adapter": folder} if folder else {}) for label, folder in folders.items()}
    outs = {label: root / f"joint-{label}" for label in folders}
    for out in outs.values():
        out.mkdir(exist_ok=True)
    return score_models(configs, inputs, outs)


def test_job_of_several_models_loads_the_base_once_and_scores_each_as_if_alone(
    tmp_path: Path, loads: list[str]
) -> None:
    base = save_base(tmp_path)
    random_rows(tmp_path / "legal")
    random_rows(tmp_path / "general", seed=5)
    folders = {n: save_lora(base, tmp_path / n, seed=i) for i, n in enumerate("abc")}
    found = jointly(tmp_path, base, {"base": None, **folders})
    assert len(loads) == 1
    for label, folder in {"base": None, **folders}.items():
        loading._loaded.clear()
        alone = jointly(tmp_path, base, {f"{label}-alone": folder})
        both = [[{**row, "model": ""} for row in facts["scores"]] for facts in (found[label], alone[f"{label}-alone"])]
        assert both[0] == both[1]
    metrics = {(r["model"], r["metric"]) for r in found["a"]["scores"]}
    assert ("a", "token_kl") in metrics
    assert not any(r["metric"] == "token_kl" for r in found["base"]["scores"])


def spoil(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, float("nan"))


def test_model_that_fails_takes_no_other_of_its_job_along(tmp_path: Path, loads: list[str]) -> None:
    base = save_base(tmp_path)
    random_rows(tmp_path / "legal")
    random_rows(tmp_path / "general", seed=5)
    (tmp_path / "other").mkdir()
    foreign = save_lora(save_base(tmp_path / "other", seed=9), tmp_path / "foreign")
    torn = save_lora(base, tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes(b"torn")
    broken = save_trained_lora(open_base(base), tmp_path / "broken", spoil, lora_rank=4)
    folders = {"foreign": foreign, "torn": torn, "broken": broken, "good": save_lora(base, tmp_path / "good")}
    found = jointly(tmp_path, base, {"base": None, **folders})
    assert {label: type(made).__name__ for label, made in found.items()} == {
        "base": "dict",
        "foreign": "ModelError",
        "torn": "ModelError",
        "broken": "DataError",
        "good": "dict",
    }
    assert "was trained on" in str(found["foreign"])
    assert "can't be read" in str(found["torn"])
    assert "the model is broken" in str(found["broken"])
    alone = jointly(tmp_path, base, {"good-alone": folders["good"]})["good-alone"]
    assert [r["value"] for r in found["good"]["scores"]] == [r["value"] for r in alone["scores"]]
    assert len(loads) == 1


def test_second_life_measures_only_what_the_first_one_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path)
    random_rows(tmp_path / "legal")
    random_rows(tmp_path / "general", seed=5)
    folders = {n: save_lora(base, tmp_path / n, seed=i) for i, n in enumerate("ab")}
    measured: list[str] = []
    real = held_out.HeldOut.measure

    def dying(self: Any, model: Any, *args: Any, **more: Any) -> Any:
        measured.append(f"{model.active_adapter} {self.domain}")
        if len(measured) == 4:
            raise KeyboardInterrupt
        return real(self, model, *args, **more)

    monkeypatch.setattr(held_out.HeldOut, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        jointly(tmp_path, base, folders)
    first, measured[:] = list(measured), []
    found = jointly(tmp_path, base, folders)
    assert first == ["model_0 general", "model_0 legal", "model_1 general", "model_1 legal"]
    assert measured == ["model_1 general", "model_1 legal"]
    assert found["a"]["num_documents"] == found["b"]["num_documents"] > 0
