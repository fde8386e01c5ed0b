"""A halving in one process: what it trains, keeps and chooses; and that nothing is trained twice, kills or no kills."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.artifacts.store import Manifest
from qlora_dist.config.evaluate import TrackingConfig, TrackingName
from qlora_dist.config.model import Dtype, ModelConfig
from qlora_dist.config.stages import AdapterConfig, BaseConfig, HalvedConfig, RowsConfig, TokenizerConfig
from qlora_dist.config.sweep import TrialConfig
from qlora_dist.config.train import LoraConfig, Optimizer, StrategyConfig, StrategyName, TrainConfig
from qlora_dist.model.base import prepare_base
from qlora_dist.pipeline.plan import Node, Plan
from qlora_dist.pipeline.run import run_node
from qlora_dist.runtime import sinks, write_json
from qlora_dist.testing import save_rows, save_tiny_model
from qlora_dist.train.halving import Halving, Result, play

MODEL = ModelConfig(compute_dtype=Dtype.float32)
RATES, RANKS = (0.3, 0.03, 0.01, 0.001, 0.0003), (2, 4)
STEPS, TOKENS = 9, 128


def trials(ranks=RANKS, optimizer=Optimizer.adamw) -> list[TrialConfig]:
    recipe = {"row_tokens": 32, "tokens_per_step": TOKENS, "micro_batch_tokens": TOKENS, "max_steps": STEPS}
    return [
        TrialConfig(
            name=f"r{rank}-lr{rate}",
            lora=LoraConfig(lora_rank=rank),
            train=TrainConfig(**recipe, epochs=100.0, learning_rate=rate, checkpoint_every_s=0.0, optimizer=optimizer),
            seed=1,
        )
        for rank in ranks
        for rate in RATES
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A root whose artifacts are all that a halving reads."""
    root = tmp_path_factory.mktemp("made")
    plan, nodes = inputs_of(root)
    folders = {name: plan.store.folder(node.id) for name, node in nodes.items()}
    save_tiny_model(folders["tokenizer"])
    folders["base"].mkdir(parents=True)
    prepare_base(BaseConfig(model=replace(MODEL, path=str(folders["tokenizer"]))), {}, folders["base"])
    for seed, name in enumerate(("rows", "validation", "rows-general")):
        folders[name].mkdir(parents=True)
        save_rows(folders[name], 24, seed=0 if name != "rows-general" else seed)
    for name, node in nodes.items():
        values = {"stage": node.stage, "label": node.label, "key": node.key, "version": 1, "recipe": node.recipe}
        manifest = Manifest(**values, inputs={}, leaves={}, execution=node.config)
        write_json(folders[name] / "manifest.json", {f: getattr(manifest, f) for f in Manifest.__dataclass_fields__})
    return root


def inputs_of(root: Path) -> tuple[Plan, dict[str, Node]]:
    plan = Plan(experiment="run", root=str(root), command="", config={"tracking": {"name": "none", "project": "p"}})
    nodes = {
        "base": plan.add("base", "tiny", BaseConfig(model=MODEL)),
        "tokenizer": plan.add("tokenizer", "tiny", TokenizerConfig()),
        "rows": plan.add("rows", "legal-0", RowsConfig(shard=0, row_tokens=32)),
        "validation": plan.add("rows", "legal-validation", RowsConfig(split="validation", row_tokens=32)),
        "rows-general": plan.add("rows", "general-validation", RowsConfig(split="validation", row_tokens=33)),
    }
    return plan, nodes


class Shard:
    """A copy of what was made, in which halvings are run."""

    def __init__(self, made: Path, folder: Path):
        self.root = shutil.copytree(made, folder / "runs")
        # the base names its files by their full path
        for path in self.root.glob("artifacts/base/*/base.json"):
            path.write_text(path.read_text().replace(str(made), str(self.root)))

    def halve(
        self, *, ranks=RANKS, optimizer=Optimizer.adamw, lanes=10, max_forgetting=9.0, first_rung_tokens=0
    ) -> Path:
        plan, nodes = inputs_of(self.root)
        config = HalvedConfig(
            domain="legal",
            model=MODEL,
            trials=trials(ranks, optimizer),
            strategy=StrategyConfig(name=StrategyName.ddp),
            max_forgetting=max_forgetting,
            first_rung_tokens=first_rung_tokens,
            lanes=lanes,
            batch_tokens=512,
            experiment="run",
            root=str(self.root),
            tracking=TrackingConfig(name=TrackingName.none),
        )
        node = plan.add("halved", "legal-0", config, inputs=nodes)
        (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
        run_node(plan, node)
        return plan.store.folder(node.id)

    def artifacts(self, stage: str) -> dict[str, Path]:
        return {p.parent.name: p.parent for p in self.root.glob(f"artifacts/{stage}/*/manifest.json")}

    def adapters(self) -> dict[str, dict]:
        return {
            key: load_file(folder / "adapter_model.safetensors") for key, folder in self.artifacts("adapter").items()
        }


@pytest.fixture
def shard(made, tmp_path) -> Shard:
    return Shard(made, tmp_path)


def verdict(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


class Heard:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.rows: list[tuple[int, dict]] = []

    def log(self, step, values):
        self.rows.append((step, dict(values)))


def test_a_halving_leaves_the_winner_and_an_adapter_for_each_trial_that_came_to_the_end(shard):
    heard = {trial.name: Heard() for trial in trials()}
    with ExitStack() as stack:
        for name, sink in heard.items():
            stack.enter_context(sinks(sink, lane=name))
        out = shard.halve()
    told = verdict(out)
    for row in told["trials"]:
        step, values = next((s, v) for s, v in reversed(heard[row["trial"]].rows) if "validation_bits_per_byte" in v)
        at = max((r for r in told["rungs"] if r["trial"] == row["trial"]), key=lambda r: r["rung"])
        assert (step * TOKENS, values["validation_bits_per_byte"]) == (row["tokens"], at["value"])
        assert values.get("is_chosen", 0.0) == (row["trial"] == told["winner"])
    rungs = Counter(row["rung"] for row in told["rungs"])
    assert rungs == {0: 10, 1: 3, 2: 1}
    states = Counter(row["state"].split(" at ")[0] for row in told["trials"])
    assert states == {"finished": 1, "stopped": 9}
    assert told["tokens"] == TOKENS * (10 * 1 + 3 * 2 + 1 * 6)
    assert told["grid_tokens"] == TOKENS * STEPS * 10
    assert len(shard.artifacts("rung")) == 14
    (folder,) = shard.artifacts("adapter").values()
    assert (out / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    by_rung = {r: {row["trial"]: row["value"] for row in told["rungs"] if row["rung"] == r} for r in range(3)}
    best = sorted(by_rung[0], key=lambda name: by_rung[0][name])[:3]
    assert set(by_rung[1]) == set(best)
    assert all(value > 0 for values in by_rung.values() for value in values.values())
    assert not list(out.glob("race*"))
    curve = [json.loads(line) for line in (out / "curves" / f"{told['winner']}.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in curve if "validation_bits_per_byte" in row] == [1, 3]


@pytest.mark.parametrize(
    ("optimizer", "ranks", "within"), [(Optimizer.adamw, RANKS, 1e-5), (Optimizer.adamw_8bit, (64, 128), 1e-3)]
)
def test_the_adapter_that_comes_to_the_end_is_the_one_that_is_trained_alone_under_the_same_key(
    shard, tmp_path, optimizer, ranks, within
):
    """Its moments have rested on disk between the rungs, of a wide factor in a byte a value."""
    from qlora_dist.train import train_adapter

    shard.halve(ranks=ranks, optimizer=optimizer, lanes=4)
    rests = {
        t.dtype for rung in shard.artifacts("rung").values() for t in load_file(rung / "state.safetensors").values()
    }
    assert (torch.uint8 in rests) == (optimizer is Optimizer.adamw_8bit)
    ((name, folder),) = shard.artifacts("adapter").items()
    plan, nodes = inputs_of(shard.root)
    recipe = json.loads((folder / "manifest.json").read_text())["recipe"]
    config = AdapterConfig(
        model=MODEL,
        lora=LoraConfig(lora_rank=recipe["lora"]["lora_rank"]),
        train=replace(trials(optimizer=optimizer)[0].train, learning_rate=recipe["train"]["learning_rate"]),
        strategy=StrategyConfig(name=StrategyName.ddp),
        seed=1,
    )
    named = {name: nodes[name] for name in ("base", "tokenizer", "rows", "validation")}
    assert plan.add("adapter", "legal-0", config, inputs=named).id == f"adapter/{name}"
    train_adapter(config, {n: plan.store.folder(node.id) for n, node in named.items()}, tmp_path)
    alone, swept = load_file(tmp_path / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    for key, value in alone.items():
        assert (value - swept[key]).abs().max() < within


def test_it_finds_what_training_all_to_the_end_finds_at_a_quarter_of_the_tokens(shard):
    """With one rung, at the end of the budget, a halving is the full grid."""
    halved, whole = verdict(shard.halve()), verdict(shard.halve(first_rung_tokens=STEPS * TOKENS))
    assert whole["tokens"] == whole["grid_tokens"]
    values = {row["trial"]: row["validation_bits_per_byte"] for row in whole["trials"]}
    assert len(values) == 10
    assert values[halved["best"]] <= 1.005 * min(values.values())
    assert max(values.values()) > 1.005 * min(values.values()), "not any trial would do"
    assert halved["tokens"] <= 0.35 * halved["grid_tokens"]


def test_decisions_are_those_of_the_recorded_curves(shard):
    """A sweep that was run is the replay of what its trials come to when all are trained to the end."""
    told = verdict(shard.halve(lanes=4))
    values = {(row["trial"], row["rung"]): row["value"] for row in told["rungs"]}
    names = [t.name for t in trials()]
    replayed = play(Halving([[1, 3, 9]] * 10, 3, 4), lambda t, r: Result(values[names[t], r]))
    assert {(names[t], r) for t, r in replayed.results} == set(values)


def test_a_trial_more_trains_that_one_alone_and_a_second_time_nothing(shard, monkeypatch):
    shard.halve(ranks=(2,))
    before = set(shard.artifacts("rung"))
    taken = steps_of_lanes(monkeypatch)
    shard.halve(ranks=(2, 4))
    assert before <= set(shard.artifacts("rung"))
    assert {name for name, steps in taken.items() if 0 in steps} == {f"r4-lr{rate}" for rate in RATES}
    assert all(len(steps) == len(set(steps)) for steps in taken.values())
    taken.clear()
    for folder in shard.artifacts("halved").values():
        shutil.rmtree(folder)
    shard.halve(ranks=(2, 4))
    assert taken == {}


def steps_of_lanes(monkeypatch) -> dict[str, list[int]]:
    """Notes every step that any lane takes from now on."""
    from qlora_dist.train.step import Stepper

    taken: dict[str, list[int]] = {}
    plain = Stepper.take

    def take(self, steps, *rest):
        for k, step in steps.items():
            taken.setdefault(self.lanes[k].name, []).append(step)
        return plain(self, steps, *rest)

    monkeypatch.setattr(Stepper, "take", take)
    return taken


def life(shard: Shard, log: Path, kill_after: int | None = None, and_s: float = 0.0) -> int:
    """Runs one life of the halving in a forked process; returns its exit code.

    It is killed some seconds after it has logged so many steps of lanes: counted, for a machine may be fast or slow.
    """
    begun = steps_in(log)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            note_steps(log)
            shard.halve(lanes=6)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        while steps_in(log) < begun + kill_after and not has_ended(pid):
            time.sleep(0.005)
        time.sleep(and_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def steps_in(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def note_steps(log: Path) -> None:
    from qlora_dist.train.step import Stepper

    plain = Stepper.take

    def take(self, steps, *rest):
        results = plain(self, steps, *rest)
        with log.open("a") as file:
            file.write("".join(f"{self.lanes[k].name} {step}\n" for k, step in steps.items()))
        time.sleep(0.05)  # a halving is longer than its killer's patience, on a fast machine too
        return results

    Stepper.take = take


def test_killed_at_any_moment_it_ends_with_the_same_winner_and_the_same_bytes_and_loses_a_turn_at_most(made, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Shard(made, tmp_path / "whole"), Shard(made, tmp_path / "killed")
    expected = verdict(whole.halve(lanes=6))
    chance, kills, log = random.Random(5), 0, tmp_path / "steps.log"
    for _ in range(6):
        kills += life(killed, log, chance.randint(0, 1), chance.uniform(0.0, 0.1)) == -signal.SIGKILL
    assert kills >= 4
    assert life(killed, log) == 0
    (out,) = killed.artifacts("halved").values()
    assert verdict(out) == expected
    mine, theirs = whole.adapters(), killed.adapters()
    assert mine.keys() == theirs.keys()
    for key, tensors in mine.items():
        assert all((tensors[name] == theirs[key][name]).all() for name in tensors), "the same to the bit"
    steps = Counter(log.read_text().splitlines())
    again = sum(count - 1 for count in steps.values())
    assert again <= kills * 6, "a kill loses no more than the turn that was being taken"
