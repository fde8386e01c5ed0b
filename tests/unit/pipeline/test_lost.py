"""A trial whose loss is no number any more is a finding, and no failure: one of the others is chosen."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import (
    AdapterConfig,
    BaseConfig,
    MergedConfig,
    ScoresConfig,
    TokenizerConfig,
    WinnerConfig,
)
from qlora_dist.config.sweep import TrialConfig
from qlora_dist.config.train import LoraConfig, TrainConfig
from qlora_dist.errors import ConfigError, PeerLost, TrainError
from qlora_dist.evaluate.documents import Document, write_documents
from qlora_dist.model.base import prepare_base
from qlora_dist.pipeline.group import run_nodes
from qlora_dist.pipeline.plan import Plan
from qlora_dist.pipeline.stages import Stage
from qlora_dist.pipeline.winner import choose_trial
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train import train_adapters

LABELS = ("files-0.good", "files-0.bad")
NAN = TrainError("Step 2: loss is nan, so the weights are lost. Lower train.learning_rate.")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A sweep of two trials, and a merge that reads one of them as a run without a sweep does."""
    plan = Plan(experiment="test", root=str(tmp_path), command="", config={"tracking": {"name": "none", "project": ""}})
    (plan.folder / "logs").mkdir(parents=True)
    base = plan.add("tokenizer", "base", TokenizerConfig(path="base"))
    inputs = {}
    for seed, label in enumerate(LABELS):
        adapter = plan.add("adapter", label, AdapterConfig(seed=seed), inputs={"base": base}, group="sweep-0")
        inputs[f"adapter-{label}"] = adapter
        reads = {"adapter": adapter}
        inputs[f"scores-{label}"] = plan.add("validated", label, ScoresConfig(), inputs=reads, group="trials-0")
    plan.add("winner", "files-0", WinnerConfig(domain="files"), inputs=inputs)
    return plan


@pytest.fixture
def train(plan, monkeypatch):
    """Runs the jobs of the adapters and of their scores, whose second lane ends in an error, after a last loss."""
    calls: list[list[str]] = []

    def run(error: Exception, last: float = math.nan) -> int:
        def joint(configs, inputs, outs):
            calls.append(list(configs))
            for label, out in outs.items():
                (out / "checkpoints").mkdir(exist_ok=True)
                losses = [2.0, last if label == LABELS[1] else 1.0]
                lines = [{"step": n + 1, "loss": loss, "grad_norm": 1.0} for n, loss in enumerate(losses)]
                (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            is_adapter = next(iter(configs.values())).__class__ is AdapterConfig
            return {label: error if is_adapter and label == LABELS[1] else {"tokens": 8192} for label in configs}

        monkeypatch.setattr(Stage, "load", lambda _: lambda config, inputs, out: {})
        monkeypatch.setattr(Stage, "load_joint", lambda _: joint)
        codes = [run_nodes(plan, [plan.nodes[0]])]
        codes += [run_nodes(plan, [n for n in plan.nodes if n.stage == stage]) for stage in ("adapter", "validated")]
        return max(codes)

    run.calls = calls
    return run


def test_a_lost_trial_is_finished_with_the_reason_and_never_trained_or_scored_again(plan, train):
    assert train(NAN) == 0
    folder = plan.store.folder(plan.node(f"adapter/{LABELS[1]}").id)
    assert plan.store.manifest(plan.node(f"adapter/{LABELS[1]}").id).facts == {"lost": str(NAN), "tokens": 8192}
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "metrics.jsonl"]
    assert json.loads((folder / "metrics.jsonl").read_text())["step"] == 1, "a step that was lost is no curve"
    assert plan.store.manifest(plan.node(f"validated/{LABELS[1]}").id).facts == {"lost": str(NAN)}
    assert sorted(train.calls[0]) == sorted(LABELS)
    assert train.calls[1:] == [[LABELS[0]]]
    assert train(NAN) == 0
    assert len(train.calls) == 2


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (TrainError("rows don't fit"), 2.0),
        (PeerLost("gone"), math.nan),
        (ConfigError("no such layer"), math.nan),
    ],
)
def test_any_other_end_is_a_failure_and_is_tried_again(plan, train, error, last):
    assert train(error, last) != 0
    assert not plan.store.has(plan.node(f"adapter/{LABELS[1]}").id)
    assert train(NAN) == 0, "the next life decides anew"


def test_outside_of_a_sweep_a_training_that_is_lost_fails(plan, train):
    plan.nodes = [node for node in plan.nodes if node.stage != "winner"]
    assert train(NAN) == 1
    assert not plan.store.has(plan.node(f"adapter/{LABELS[1]}").id)


def test_a_run_that_would_ship_a_lost_trial_is_told_so(plan, train):
    train(NAN)
    lost = plan.node(f"adapter/{LABELS[1]}")
    merged = plan.add("merged", "all", MergedConfig(), inputs={"files-0": lost})
    assert run_nodes(plan, [merged]) == 1
    word = json.loads(plan.failure_path(merged).read_text())["message"]
    assert "was trained in a sweep, and lost. Step 2: loss is nan" in word
    assert f"delete {plan.store.folder(lost.id)} to train it again" in word


@pytest.fixture
def trials(tmp_path: Path):
    """Chooses among trials of which these are lost."""

    def choose(*lost: str):
        config, inputs = WinnerConfig(domain="legal", max_forgetting=9.0), {}
        for number, name in enumerate(["base", "r4", "r8", "r16"]):
            for kind in ("scores", "adapter"):
                inputs[f"{kind}-{name}"] = folder = tmp_path / kind / name
                folder.mkdir(parents=True)
                facts = {"tokens": 100} | ({"lost": "Step 2: loss is nan."} if name in lost else {})
                (folder / "manifest.json").write_text(json.dumps({"facts": facts}))
            if name not in lost:
                common = {"split": "validation", "tokens": 10, "bytes": 100, "nll_bits": 100.0 - number}
                rows = [Document(domain=d, record=d, cluster=d, **common) for d in ("legal", "general")]
                write_documents(rows, inputs[f"scores-{name}"])
            if name != "base":
                config.trials.append(TrialConfig(name=name, lora=LoraConfig(lora_rank=int(name[1:]))))
        (tmp_path / "out").mkdir()
        return choose_trial(config, inputs, tmp_path / "out")

    return choose


def test_one_of_those_that_were_not_lost_is_chosen_and_the_others_are_told(trials):
    told = trials("r8")
    assert told["winner"] in {"r4", "r16"}
    assert [(row["trial"], row["state"]) for row in told["trials"]] == [
        ("r4", "finished"),
        ("r8", "lost"),
        ("r16", "finished"),
    ]
    assert told["trials"][1]["why"] == "Step 2: loss is nan."
    assert told["reason"].endswith("1 of 3 trials were lost. r8: Step 2: loss is nan.")


def test_when_all_are_lost_the_swept_keys_are_named(trials):
    message = r"All 3 trials were lost\. r4: Step 2: loss is nan; so was r8, r16\. Change sweep\.lora_rank, or"
    with pytest.raises(TrainError, match=message):
        trials("r4", "r8", "r16")


def test_a_trial_of_layers_that_the_base_has_not_fails_alone(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model), compute_dtype=Dtype.float32)), {}, tmp_path / "base")
    one = AdapterConfig(
        model=ModelConfig(quantization=Quantization.nf4, compute_dtype=Dtype.float32),
        lora=LoraConfig(target_modules=["q_proj"]),
        train=TrainConfig(row_tokens=32, tokens_per_step=128, micro_batch_tokens=64, max_steps=2),
    )
    configs = {"right": one, "wrong": replace(one, lora=LoraConfig(target_modules=["qproj"]))}
    read = {"base": tmp_path / "base", "tokenizer": model, "rows": save_rows(tmp_path / "rows", 12, seed=1)}
    outs = {label: tmp_path / label for label in configs}
    for out in outs.values():
        out.mkdir()
    made = train_adapters(configs, dict.fromkeys(configs, read), outs)
    assert isinstance(made["wrong"], ConfigError)
    assert "lora.target_modules=qproj" in str(made["wrong"])
    assert made["right"]["num_steps"] == 2
    assert (outs["right"] / "adapter_model.safetensors").exists()
