from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_dist.config.evaluate import EvaluateConfig, Gate
from qlora_dist.errors import ConfigError
from qlora_dist.evaluate.compare import compare_models
from qlora_dist.evaluate.documents import Document, write_documents
from qlora_dist.evaluate.gate import assess
from qlora_dist.launch.compose import compose_run


def save(folder: Path, change: dict[str, float], seed: int = 0, num_documents: int = 40) -> Path:
    """Saves a model's documents; `change` is its mean change of bits per byte on each domain."""
    rng, documents = np.random.default_rng(0), []
    noise = np.random.default_rng(seed + 1)
    for domain, shift in change.items():
        for i in range(num_documents):
            size, hard = int(rng.integers(200, 2000)), rng.normal(2.5, 0.5)
            rate = hard + shift + 0.02 * noise.normal()
            documents.append(
                Document(
                    domain=domain,
                    split="test",
                    record=f"{domain}-{i}",
                    cluster=f"c{i}",
                    nll=rate * size * 0.7,
                    nll_bits=rate * size,
                    tokens=size // 4,
                    bytes=size,
                )
            )
    folder.mkdir()
    write_documents(documents, folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    flat = {"legal": 0.0, "general": 0.0}
    return {
        "base": save(tmp_path / "base", flat),
        "merged": save(tmp_path / "merged", {"legal": -0.3, "general": 0.02}, 1),
        "idle": save(tmp_path / "idle", flat, 2),
        "forgetful": save(tmp_path / "forgetful", {"legal": -0.4, "general": 0.6}, 3),
    }


def test_differences_are_paired_so_that_small_ones_show_among_uneven_documents(folders: dict[str, Path]) -> None:
    rows = {(r["model"], r["domain"]): r for r in compare_models(folders) if r["metric"] == "bits_per_byte"}
    merged = rows["merged", "legal"]
    assert merged["difference"] == pytest.approx(-0.3, abs=0.02)
    assert merged["high"] - merged["low"] < 0.05, "the spread of the documents themselves is 0.5"
    assert merged["p_holm"] < 0.01
    assert rows["idle", "legal"]["p_holm"] > 0.05
    assert merged["p_holm"] >= merged["p_value"]
    assert 0 < merged["minimal_detectable"] < 0.05


@pytest.mark.parametrize(
    ("model", "passed"),
    [("merged", [True, True]), ("idle", [False, True]), ("forgetful", [True, False])],
)
def test_verdict_names_what_stopped_it(folders: dict[str, Path], model: str, passed: list[bool]) -> None:
    verdict = assess(folders, model, ["legal"], EvaluateConfig())["verdict"]
    assert [r["passed"] for r in verdict["reasons"]] == passed
    assert verdict["ship"] is all(passed)
    assert "documents: 40" in verdict["reasons"][0]["found"]


def test_thresholds_come_from_the_config(folders: dict[str, Path]) -> None:
    demanding = assess(folders, "merged", ["legal"], EvaluateConfig(min_gain=0.5))["verdict"]
    assert not demanding["ship"]
    lenient = assess(folders, "forgetful", ["legal"], EvaluateConfig(max_forgetting=1.0))["verdict"]
    assert lenient["ship"]


def save_scores(folder: Path, **values: float) -> None:
    rows = [
        {
            "domain": domain,
            "metric": metric,
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
            "num_documents": 12,
        }
        for domain in ("legal", "general")
        for metric, value in values.items()
    ]
    (folder / "scores.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")


@pytest.mark.parametrize(("reached", "ships"), [(0.96, True), (0.94, False)])
def test_form_or_truth_that_the_config_asks_for_is_judged_on_the_domains(
    folders: dict[str, Path], reached: float, ships: bool
) -> None:
    save_scores(folders["merged"], schema_valid=reached)
    verdict = assess(folders, "merged", ["legal"], EvaluateConfig(min_scores={"schema_valid": 0.95}))["verdict"]
    (reason,) = [r for r in verdict["reasons"] if "schema_valid" in r["check"]]
    assert (reason["check"], reason["passed"]) == ("schema_valid reached on legal", ships)
    assert reason["wanted"] == "schema_valid at least 0.95"
    assert reason["found"] == f"{reached:.4f} ({reached - 0.1:.4f} to {reached + 0.1:.4f}; documents: 12)"
    assert verdict["ship"] is ships
    unasked = assess(folders, "merged", ["legal"], EvaluateConfig(min_scores={"exact_match": 0.1}))["verdict"]
    assert ("exact_match reached", "not measured") in {(r["check"], r["found"]) for r in unasked["reasons"]}
    assert not unasked["ship"]


def test_least_scores_are_given_by_name() -> None:
    config = compose_run(["+experiment=smoke", "+evaluate.min_scores.schema_valid=0.95"])
    assert config.evaluate.min_scores == {"schema_valid": 0.95}
    with pytest.raises(ConfigError, match="min_scores"):
        compose_run(["+experiment=smoke", "+evaluate.min_scores.schema_valid=-1"])


def test_divergence_from_the_base_is_a_score_and_not_compared_with_the_base_again(folders: dict[str, Path]) -> None:
    metrics = {row["metric"] for row in compare_models(folders)}
    assert "bits_per_byte" in metrics
    assert "token_kl" not in metrics


def test_what_was_not_measured_does_not_ship(folders: dict[str, Path]) -> None:
    verdict = assess(folders, "merged", ["legal", "code"], EvaluateConfig())["verdict"]
    assert [r["found"] for r in verdict["reasons"] if not r["passed"]] == ["not measured"]


def test_no_gate_and_no_base_give_no_verdict(folders: dict[str, Path]) -> None:
    assert assess(folders, "merged", ["legal"], EvaluateConfig(gate=Gate.off))["verdict"] is None
    alone = {"merged": folders["merged"]}
    assert assess(alone, "merged", ["legal"], EvaluateConfig()) == {
        "comparisons": [],
        "verdict": None,
        "examples": [],
    }
