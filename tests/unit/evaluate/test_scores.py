from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_dist.config.evaluate import EvaluateConfig
from qlora_dist.config.stages import ScoresConfig
from qlora_dist.data.rows import Rows
from qlora_dist.errors import DataError, ModelError
from qlora_dist.evaluate import likelihood
from qlora_dist.evaluate.documents import read_documents
from qlora_dist.evaluate.scores import score_model

from .models import END, model_config, random_rows, save_base, save_lora, write_rows

LIKELIHOOD = ("bits_per_byte", "completion_loss", "next_token_accuracy", "calibration_error")


def score(folder: Path, inputs: Mapping[str, Path], name: str = "base", **evaluate: Any) -> list[dict[str, Any]]:
    out = folder / f"scores-{name}"
    out.mkdir(exist_ok=True)
    config = ScoresConfig(model=model_config(folder), name=name, evaluate=EvaluateConfig(**evaluate))
    facts = score_model(config, inputs, out)
    rows: list[dict[str, Any]] = json.loads((out / "scores.json").read_text())["rows"]
    assert facts["scores"] == rows
    return rows


def one_by_one(model: Any, folder: Path) -> dict[str, list[float]]:
    """Sums (nats, nats of targets with bytes, targets) of each record, each segment in a forward of its own."""
    rows, sums = Rows.open(folder), defaultdict(lambda: [0.0, 0.0, 0.0])
    for segment in rows.segments:
        part = slice(int(segment["start"]), int(segment["start"] + segment["length"]))
        tokens_T = torch.from_numpy(rows.tokens_BT[segment["row"], part].astype(np.int64))
        trained_T = torch.from_numpy(np.array(rows.trained_BT[segment["row"], part]))
        with torch.no_grad():
            logp_TV = model(tokens_T[None]).logits[0].float().log_softmax(-1)
        nll_T = -logp_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]
        kept_T = trained_T[1:]
        sum_ = sums[rows.records[int(segment["record"])]["id"]]
        sum_[0] += float(nll_T[kept_T].sum())
        sum_[1] += float(nll_T[kept_T & (tokens_T[1:] != END)].sum())
        sum_[2] += int(kept_T.sum())
    return dict(sums)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    base = save_base(tmp_path)
    return {
        "base": base,
        "rows-legal": random_rows(tmp_path / "legal"),
        "rows-general": random_rows(tmp_path / "g", 11, 5),
    }


@pytest.mark.parametrize("adapted", [False, True])
def test_packed_chunked_sums_equal_a_forward_for_each_segment(
    inputs: dict[str, Path], tmp_path: Path, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 7 * 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    if adapted:
        inputs["adapter"] = save_lora(inputs["base"], tmp_path / "adapter")
        model = PeftModel.from_pretrained(model, str(inputs["adapter"])).eval()
    score(tmp_path, inputs, batch_tokens=96)
    found = {d.record: d for d in read_documents(tmp_path / "scores-base") if d.domain == "legal"}
    wanted = one_by_one(model, inputs["rows-legal"])
    assert len(found) == len(wanted) == 24
    for record, (nll, nll_of_bytes, tokens) in wanted.items():
        assert found[record].nll == pytest.approx(nll, rel=1e-5)
        assert found[record].nll_bits == pytest.approx(nll_of_bytes / math.log(2), rel=1e-5)
        assert found[record].tokens == tokens


def test_scores_are_ratios_of_sums_with_an_interval_around_them(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = score(tmp_path, inputs)
    documents = [d for d in read_documents(tmp_path / "scores-base") if d.domain == "legal"]
    value = {(r["domain"], r["metric"]): r for r in rows}
    assert set(value) == {(d, m) for d in ("legal", "general") for m in LIKELIHOOD}
    bits = value["legal", "bits_per_byte"]
    assert bits["value"] == pytest.approx(sum(d.nll_bits for d in documents) / sum(d.bytes for d in documents))
    assert bits["low"] < bits["value"] < bits["high"]
    assert bits["num_documents"] == 24
    loss = value["legal", "completion_loss"]["value"]
    assert loss == pytest.approx(sum(d.nll for d in documents) / sum(d.tokens for d in documents))
    assert loss == pytest.approx(math.log(64), abs=0.5), "a random model is about uniform"


def test_result_does_not_depend_on_the_batch_and_is_written_over(inputs: dict[str, Path], tmp_path: Path) -> None:
    first = score(tmp_path, inputs, batch_tokens=48)
    (tmp_path / "scores-base" / "scores.json").write_text("torn")
    second = score(tmp_path, inputs, batch_tokens=4096)
    assert [r["value"] for r in first] == pytest.approx([r["value"] for r in second], rel=1e-5)


def test_max_rows_scores_the_first_rows_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = score(tmp_path, inputs, max_rows=3)
    assert {r["num_documents"] for r in rows} == {6}
    assert {r["low"] for r in rows} == {None}, "three clusters are too few for an interval"


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2"])
def test_other_architectures_score_as_their_own_forward_does(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path, model_type=kind)
    inputs = {"base": base, "rows-legal": random_rows(tmp_path / "legal", 2)}
    score(tmp_path, inputs)
    wanted = one_by_one(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), inputs["rows-legal"])
    for document in read_documents(tmp_path / "scores-base"):
        assert document.nll == pytest.approx(wanted[document.record][0], rel=1e-4)


def test_head_that_scales_its_logits_is_refused_not_scored_wrongly(tmp_path: Path) -> None:
    base = save_base(tmp_path, model_type="granite", logits_scaling=8.0, initializer_range=0.2)
    inputs = {"base": base, "rows-legal": random_rows(tmp_path / "legal", 2)}
    with pytest.raises(ModelError, match="does more with its logits"):
        score(tmp_path, inputs)


def test_adapter_of_another_base_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    foreign = save_base(tmp_path / "other", seed=9)
    inputs["adapter"] = save_lora(foreign, tmp_path / "adapter")
    with pytest.raises(ModelError, match="trained on"):
        score(tmp_path, inputs)


def test_fully_fine_tuned_model_takes_the_place_of_the_base(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    save_base(tmp_path / "tuned", seed=3)
    base = score(tmp_path, inputs)
    out = tmp_path / "scores-full"
    out.mkdir()
    config = ScoresConfig(model=model_config(tmp_path), name="legal-0", full=True)
    facts = score_model(config, {**inputs, "adapter": tmp_path / "tuned" / "model"}, out)
    assert [r["value"] for r in facts["scores"]] != [r["value"] for r in base]


def test_set_without_targets_is_an_error(inputs: dict[str, Path], tmp_path: Path) -> None:
    inputs["rows-legal"] = write_rows(tmp_path / "none", [[(0, [5, 6, 7], 3)]])
    with pytest.raises(DataError, match="nothing to score"):
        score(tmp_path, inputs)
