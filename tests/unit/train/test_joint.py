"""Adapters trained in one group are the adapters of their own runs, and each ends, fails and continues on its own."""

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.config.model import Dtype, ModelConfig, Quantization
from qlora_dist.config.stages import AdapterConfig, BaseConfig
from qlora_dist.config.train import LoraConfig, StrategyConfig, StrategyName, TrainConfig
from qlora_dist.errors import ConfigError, Preempted, TrainError
from qlora_dist.model.adapter import ADAPTER_FILES, read_provenance
from qlora_dist.model.base import prepare_base
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train import joint, train_adapter, train_adapters
from qlora_dist.train.checkpoint import Checkpoints
from qlora_dist.train.step import Stepper

LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three shards of rows, the last one smaller, and held-out rows for two of them: the other's split is empty."""
    top = tmp_path_factory.mktemp("inputs")
    model = save_tiny_model(top / "model")
    (top / "base").mkdir()
    prepare_base(BaseConfig(model=ModelConfig(path=str(model), compute_dtype=Dtype.float32)), {}, top / "base")
    shared = {"base": top / "base", "tokenizer": model}
    rows = {label: save_rows(top / label, size, seed=size) for label, size in zip(LABELS, (24, 24, 12), strict=True)}
    held_out = {label: save_rows(top / f"{label}-validation", 0 if label == "b" else 5, seed=1) for label in LABELS}
    return {label: shared | {"rows": rows[label], "validation": held_out[label]} for label in LABELS}


@pytest.fixture
def configs():
    recipe = TrainConfig(row_tokens=32, tokens_per_step=128, micro_batch_tokens=64, learning_rate=0.01)
    one = AdapterConfig(
        model=ModelConfig(quantization=Quantization.nf4, compute_dtype=Dtype.float32),
        lora=LoraConfig(lora_rank=4),
        train=recipe,
        strategy=StrategyConfig(name=StrategyName.ddp),
        seed=3,
    )
    return {
        "a": one,
        "b": replace(one, lora=LoraConfig(lora_rank=8, lora_alpha=4.0), train=replace(recipe, learning_rate=0.003)),
        "c": replace(one, seed=5, train=replace(recipe, tokens_per_step=256, epochs=2)),
    }


@pytest.fixture
def outs(tmp_path):
    def make(name="together"):
        folders = {label: tmp_path / name / label for label in LABELS}
        for folder in folders.values():
            folder.mkdir(parents=True)
        return folders

    return make


def weights(folder):
    return load_file(folder / ADAPTER_FILES[1])


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder, other, tolerance=1e-5):
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert float((value - theirs[name]).norm()) <= tolerance * max(1.0, float(theirs[name].norm())), name


def test_each_is_the_adapter_of_its_own_run(configs, inputs, outs):
    together, alone = outs(), outs("alone")
    made = train_adapters(configs, inputs, together)
    assert list(made) == list(LABELS)
    for label in LABELS:
        own = train_adapter(configs[label], inputs[label], alone[label])
        assert_same(together[label], alone[label])
        assert made[label]["num_steps"] == own["num_steps"]
        assert steps(together[label]) == list(range(1, own["num_steps"] + 1))
        assert ("validation_loss" in made[label]) == ("validation_loss" in own) == (label != "b")
        assert made[label].get("validation_loss", 0.0) == pytest.approx(own.get("validation_loss", 0.0), rel=1e-5)
        checks = [c["check"] for c in made[label]["certificate"]]
        assert "each lane learns from its own rows alone" in checks
        assert [c for c in checks if "alone" not in c] == [c["check"] for c in own["certificate"]]
        assert read_provenance(together[label]).validation_loss == made[label].get("validation_loss")
        files = {p.name for p in together[label].iterdir() if not p.name.startswith(".")}
        assert files == {"metrics.jsonl", "qlora_dist.json", *ADAPTER_FILES}


def test_lane_that_diverges_takes_no_other_along(configs, inputs, outs, monkeypatch):
    plain = Stepper.accumulate

    def lost(self, places, counts):
        nll_K = plain(self, places, counts)
        k = next((k for k, lane in enumerate(self.lanes) if lane.name == "b"), None)
        if k in places and places[k] == 2:
            for parameter in self.lanes[k].parameters.values():
                parameter.grad.fill_(torch.nan)
            nll_K[k] = torch.nan
        return nll_K

    monkeypatch.setattr(Stepper, "accumulate", lost)
    together, alone = outs(), outs("alone")
    made = train_adapters(configs, inputs, together)
    assert isinstance(made["b"], TrainError)
    assert "Step 3: loss is nan" in str(made["b"])
    assert not (together["b"] / ADAPTER_FILES[1]).exists()
    for label in ("a", "c"):
        train_adapter(configs[label], inputs[label], alone[label])
        assert_same(together[label], alone[label])


def test_rows_that_do_not_fit_end_their_own_lane_alone(configs, inputs, outs, tmp_path):
    inputs = inputs | {"a": inputs["a"] | {"rows": save_rows(tmp_path / "long", 8, row_tokens=64)}}
    made = train_adapters(configs, inputs, outs())
    assert isinstance(made["a"], TrainError)
    assert made["b"]["num_steps"] == 6


def test_what_cannot_share_a_base_is_refused(configs, inputs, outs):
    other = replace(configs["b"], model=replace(configs["b"].model, double_quant=False))
    with pytest.raises(ConfigError, match=r"model.*one value for all adapters"):
        train_adapters(configs | {"b": other}, inputs, outs())


def stop_after(monkeypatch, turns):
    """Has the next training stop on request, as by a signal, after some turns of its life."""
    plain = Stepper.take
    taken = []

    def take(self, places, number=0):
        results = plain(self, places, number)
        taken.append(places)
        self.wants_stop = self.asked_to_stop or len(taken) == turns
        return results

    monkeypatch.setattr(Stepper, "take", take)
    return taken


def test_stopped_group_continues_to_the_same_bytes_and_trains_nothing_twice(configs, inputs, outs, monkeypatch):
    whole, stopped = outs("whole"), outs("stopped")
    train_adapters(configs, inputs, whole)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 4)
        train_adapters(configs, inputs, stopped)
    assert weights(stopped["c"]), "it had its three steps"
    with monkeypatch.context() as patch:
        taken = stop_after(patch, 0)
        made = train_adapters(configs, inputs, stopped)
    assert taken == [{0: 4, 1: 4}, {0: 5, 1: 5}]
    assert made["a"]["resumed_after_step"] == 4
    for label in LABELS:
        assert (stopped[label] / ADAPTER_FILES[1]).read_bytes() == (whole[label] / ADAPTER_FILES[1]).read_bytes()
        assert not (stopped[label] / "checkpoints").exists()


def test_lane_of_a_stopped_group_continues_alone(configs, inputs, outs, monkeypatch):
    stopped, alone = outs("stopped"), outs("alone")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 2)
        train_adapters(configs, inputs, stopped)
    facts = train_adapter(configs["b"], inputs["b"], stopped["b"])
    assert facts["resumed_after_step"] == 2
    train_adapter(configs["b"], inputs["b"], alone["b"])
    assert_same(stopped["b"], alone["b"])


def test_killed_between_two_checkpoints_of_one_turn_the_group_goes_back_together(configs, inputs, outs, monkeypatch):
    configs = {label: replace(c, train=replace(c.train, checkpoint_every_s=0.0)) for label, c in configs.items()}
    whole, stopped = outs("whole"), outs("stopped")
    train_adapters(configs, inputs, whole)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 2)
        train_adapters(configs, inputs, stopped)
    shutil.rmtree(stopped["b"] / "checkpoints" / "step-00000002")
    made = train_adapters(configs, inputs, stopped)
    assert {made[label]["resumed_after_step"] for label in LABELS} == {1}
    for label in LABELS:
        assert (stopped[label] / ADAPTER_FILES[1]).read_bytes() == (whole[label] / ADAPTER_FILES[1]).read_bytes()


def live(work, log, owner, name, call):
    """Works in a process of its own, killed by -9 as it makes this call of `owner.name`; returns its exit code.

    The steps that it took are in `log`, `lane step` a line.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            after(Stepper, "take", lambda stepper, steps, *_: note(log, stepper, steps))
            calls = Counter()
            before(
                owner,
                name,
                lambda: calls.update([name]) or (calls[name] == call and os.kill(os.getpid(), signal.SIGKILL)),
            )
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def note(log, stepper, steps):
    with log.open("a") as file:
        file.write("".join(f"{stepper.lanes[k].name} {step}\n" for k, step in steps.items()))


def before(owner, name, do):
    plain = getattr(owner, name)
    setattr(owner, name, lambda *args, **named: (do(), plain(*args, **named))[1])


def after(owner, name, do):
    plain = getattr(owner, name)

    def both(*args, **named):
        result = plain(*args, **named)
        do(*args)
        return result

    setattr(owner, name, both)


MOMENTS = [
    (Checkpoints, "save", 5, "in the middle of a round's checkpoints"),
    (Stepper, "take", 2, "before a round"),
    (joint, "save_lane", 1, "when the first lane has ended, before its adapter is there"),
    (joint, "write_end", 1, "when its adapter is there, before it counts as done"),
    (Checkpoints, "save", 2, "in the middle of another round"),
    (joint, "write_end", 2, "when all but one lane are done"),
]


def test_killed_by_force_at_any_moment_a_sweep_ends_with_the_same_bytes_and_loses_a_turn_at_most(
    configs, inputs, outs, tmp_path
):
    configs = {label: replace(c, train=replace(c.train, checkpoint_every_s=0.0)) for label, c in configs.items()}
    whole, killed, log = outs("whole"), outs("killed"), tmp_path / "steps.log"
    train_adapters(configs, inputs, whole)
    for owner, name, call, when in MOMENTS:
        code = live(lambda: train_adapters(configs, inputs, killed), log, owner, name, call)
        assert code == -signal.SIGKILL, when
    made = train_adapters(configs, inputs, killed)
    assert list(made) == list(LABELS)
    for label in LABELS:
        assert (killed[label] / ADAPTER_FILES[1]).read_bytes() == (whole[label] / ADAPTER_FILES[1]).read_bytes()
        assert steps(killed[label]) == steps(whole[label])
    taken = Counter(log.read_text().splitlines())
    in_rounds = sum(name == "save" for _, name, *_ in MOMENTS)
    assert sum(count - 1 for count in taken.values()) <= in_rounds * len(LABELS), "a kill loses no more than a round"
