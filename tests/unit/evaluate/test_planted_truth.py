"""A made-up domain with known facts: the measures move as they must."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_dist.config.evaluate import EvaluateConfig
from qlora_dist.config.stages import BaseConfig, RowsConfig, ScoresConfig
from qlora_dist.data.record import Record
from qlora_dist.data.rows import Rows, write_rows
from qlora_dist.evaluate.answers import read_answers
from qlora_dist.evaluate.gate import assess
from qlora_dist.evaluate.scores import score_model, score_models
from qlora_dist.model.base import open_base, prepare_base
from qlora_dist.testing import save_tiny_model

from .models import model_config, save_trained_lora

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROW_TOKENS = 128
PLACES = ["Oru", "Bel", "Tam", "Kiv", "Sud", "Nar", "Pel", "Gol", "Wex", "Jit", "Hab", "Lom"]
CITIES = ["Zan", "Mip", "Dro", "Fes", "Cuv", "Rit", "Yol", "Bex", "Qua", "Vim", "Sto", "Elk"]


def facts(answers: list[str]) -> list[Record]:
    made = []
    for place, city in zip(PLACES, answers, strict=True):
        turns: Any = [{"role": "user", "content": place}, {"role": "assistant", "content": json.dumps({"city": city})}]
        made.append(named(Record(kind="instruction", messages=turns)))
    return made


def named(record: Record) -> Record:
    record.id = record.cluster = record.content_id()
    return record


def general(num: int) -> list[Record]:
    rng = random.Random(3)
    words = "the cat saw a dog near one old house and then they went home".split()  # noqa: SIM905
    texts = [" ".join(rng.choice(words) for _ in range(14)) + "." for _ in range(num)]
    return [named(Record(kind="text", text=text)) for text in texts]


def save_splits(folder: Path, train: list[Record], test: list[Record]) -> Path:
    folder.mkdir()
    for name, records in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(r.to_line() for r in records), encoding="utf-8")
    return folder


def pack(folder: Path, splits: Path, tokenizer: Path, split: str) -> Path:
    folder.mkdir()
    write_rows(RowsConfig(split=split, row_tokens=ROW_TOKENS), {"tokenizer": tokenizer, "splits": splits}, folder)
    return folder


def train(model: Any, sets: list[Path], steps: int, learning_rate: float) -> None:
    """Trains whatever has a gradient on all rows of some sets at once, a set after another."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    stream = batches(sets)
    for _ in range(steps):
        tokens_BT, labels_BT, position_BT = next(stream)
        loss = model(input_ids=tokens_BT, position_ids=position_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def batches(sets: list[Path]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    made = []
    for folder in sets:
        batch = Rows.open(folder).batch(np.arange(min(6, len(Rows.open(folder)))))
        tokens_BT, trained_BT = torch.from_numpy(batch.tokens_BT), torch.from_numpy(np.array(batch.trained_BT))
        made.append((tokens_BT, tokens_BT.masked_fill(~trained_BT, -100), torch.from_numpy(batch.position_BT)))
    while True:
        yield from made


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scores of the base and of adapters trained well, on shuffled answers, and too hard."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("planted")
    folder = save_tiny_model(root / "model", hidden_size=64, num_layers=2)
    shuffled = CITIES[1:] + CITIES[:1]
    texts = general(48)
    splits = {
        "facts": save_splits(root / "facts", facts(CITIES), facts(CITIES)),
        "shuffled": save_splits(root / "shuffled", facts(shuffled), facts(shuffled)),
        "general": save_splits(root / "general", texts[:36], texts[36:]),
    }
    rows = {name: pack(root / f"rows-{name}", path, folder, "train") for name, path in splits.items()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    train(model, [rows["general"]], 150, 3e-3)
    model.save_pretrained(folder)
    base = root / "base"
    base.mkdir()
    prepare_base(BaseConfig(model=model_config(root)), {}, base)
    inputs = {"base": base, "tokenizer": folder}
    inputs |= {f"splits-{name}": splits[name] for name in ("facts", "general")}
    inputs |= {
        f"rows-{name}": pack(root / f"test-{name}", splits[name], folder, "test") for name in ("facts", "general")
    }
    recipes = {
        "good": ([rows["facts"], rows["general"]], 400, 3e-3),
        "shuffled": ([rows["shuffled"], rows["general"]], 400, 3e-3),
        "hard": ([rows["facts"]], 150, 2e-2),
    }
    adapters = {}
    for name, (sets, steps, rate) in recipes.items():
        adapters[name] = save_trained_lora(
            open_base(base),
            root / f"adapter-{name}",
            lambda m, s=sets, n=steps, r=rate: train(m, s, n, r),
            lora_rank=16,
        )
    return score(root, {"base": inputs, **{name: {**inputs, "adapter": path} for name, path in adapters.items()}})


def score(root: Path, inputs: dict[str, dict[str, Path]]) -> dict[str, Path]:
    """Scores all models in one job: they answer in shared batches, each row with its own adapter."""
    told = EvaluateConfig(max_answers=12, max_new_tokens=24)
    configs = {name: ScoresConfig(model=model_config(root), evaluate=told, name=name) for name in inputs}
    outs = {name: root / f"scores-{name}" for name in inputs}
    for out in outs.values():
        out.mkdir()
    made = score_models(configs, inputs, outs)
    assert not [found for found in made.values() if isinstance(found, Exception)]
    return outs


def test_model_answers_alone_as_it_does_among_others(scored: dict[str, Path], tmp_path: Path) -> None:
    root = scored["base"].parent
    inputs = {"base": root / "base", "tokenizer": root / "model", "adapter": root / "adapter-good"}
    inputs |= {f"{kind}-facts": root / folder for kind, folder in (("splits", "facts"), ("rows", "test-facts"))}
    told = EvaluateConfig(max_answers=12, max_new_tokens=24)
    score_model(ScoresConfig(model=model_config(root), evaluate=told, name="good"), inputs, tmp_path)
    alone, among = ([a.answer for a in read_answers(folder)] for folder in (tmp_path, scored["good"]))
    assert alone == among
    assert alone != [a.answer for a in read_answers(scored["shuffled"])]


def value(folder: Path, metric: str, domain: str = "facts") -> float:
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    return float(next(r["value"] for r in rows if (r["domain"], r["metric"]) == (domain, metric)))


def test_adapter_that_learned_the_facts_beats_the_base_in_truth_and_form(scored: dict[str, Path]) -> None:
    assert value(scored["base"], "exact_match") == 0
    assert value(scored["base"], "schema_valid") == 0
    assert value(scored["good"], "exact_match") >= 0.8
    assert value(scored["good"], "schema_valid") >= 0.8
    assert value(scored["good"], "ended") >= 0.8


def test_adapter_of_shuffled_answers_has_the_form_but_not_the_truth(scored: dict[str, Path]) -> None:
    assert value(scored["shuffled"], "schema_valid") >= 0.8
    assert value(scored["shuffled"], "exact_match") <= 0.1
    assert value(scored["shuffled"], "bits_per_byte") > value(scored["good"], "bits_per_byte")


def test_gate_ships_the_good_adapter_and_stops_the_other_two(scored: dict[str, Path]) -> None:
    told = EvaluateConfig(min_scores={"exact_match": 0.5, "schema_valid": 0.8})
    verdicts = {name: assess(scored, name, ["facts"], told)["verdict"] for name in scored if name != "base"}
    checks = {name: {r["check"]: r["passed"] for r in verdict["reasons"]} for name, verdict in verdicts.items()}
    assert all(checks["good"].values()), verdicts["good"]
    assert verdicts["good"]["ship"]
    assert checks["shuffled"]["schema_valid reached on facts"], "it has the form"
    assert not checks["shuffled"]["exact_match reached on facts"], "and not the truth"
    assert not checks["hard"]["little forgotten"], verdicts["hard"]
    assert not verdicts["shuffled"]["ship"]
    assert not verdicts["hard"]["ship"]


def test_terms_of_the_domain_are_likelier_to_the_adapter_that_learned_it(scored: dict[str, Path]) -> None:
    assert value(scored["good"], "term_loss") < 0.2 * value(scored["base"], "term_loss")


def test_divergence_from_the_base_grows_with_forgetting(scored: dict[str, Path]) -> None:
    assert value(scored["hard"], "token_kl", "general") > 3 * value(scored["good"], "token_kl", "general") > 0


def test_wrong_forms_are_counted_by_kind_and_answers_kept(scored: dict[str, Path]) -> None:
    answers = read_answers(scored["base"])
    assert [a.prompt for a in answers] == PLACES
    assert {a.failure for a in answers} <= {"empty", "not JSON", "cut off", "text around JSON"}
    assert read_answers(scored["good"])[0].reference == '{"city": "Zan"}'


def test_examples_show_each_question_with_every_models_answer(scored: dict[str, Path]) -> None:
    examples = assess(scored, "good", ["facts"], EvaluateConfig())["examples"]
    assert [e["prompt"] for e in examples] == PLACES[:5]
    assert all(list(e["answers"]) == list(scored) for e in examples)
