"""Shards that train together apart, as real processes that share a folder and nothing else."""

import json

import pytest
from safetensors.torch import load_file

from qlora_dist.adapters.merge import merge_adapters
from qlora_dist.config.stages import MergedConfig, RoundsConfig, WorkerConfig
from qlora_dist.config.train import Optimizer
from qlora_dist.model.adapter import read_provenance
from qlora_dist.pipeline.rounds import train_worker
from qlora_dist.testing import save_rows
from tests.dist.apart import lanes, one_at_a_time, together

WORKERS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def shards(inputs, tmp_path_factory):
    """What each worker reads: rows of its own, and the rows of all."""
    rows = {f"rows-{w}": save_rows(tmp_path_factory.mktemp("rows") / w, 40, seed=i) for i, w in enumerate(WORKERS)}
    return {w: {**inputs, **rows, "rows": rows[f"rows-{w}"]} for w in WORKERS}


@pytest.fixture(scope="module")
def worker(recipe, tmp_path_factory):
    """Builds a config of 20 steps in four rounds, and the folders of two or three workers."""

    def build(name, workers=("a", "b"), wait_s=60.0, patience_s=60.0, **changed):
        plain, place = recipe(epochs=4, **changed), tmp_path_factory.mktemp(name)
        fields = {f: getattr(plain, f) for f in ("model", "lora", "train", "strategy", "seed")}
        rounds = RoundsConfig(workers=list(workers), every_steps=6)
        waits = {"meeting": str(place / "meeting"), "wait_s": wait_s, "patience_s": patience_s}
        outs = {w: place / w for w in workers}
        for out in outs.values():
            out.mkdir()
        return WorkerConfig(**fields, rounds=rounds, **waits), outs

    return build


@pytest.fixture(scope="module")
def unbroken(pool, shards, worker):
    """What two workers come to whom nothing happens: the bytes of their adapter."""
    config, outs = worker("whole")
    pool.run(together, 1, config, shards, outs)
    return read(merged(config, outs)[0])


def merged(config, outs):
    out = outs[next(iter(outs))].parent / "merged"
    out.mkdir()
    return out, merge_adapters(MergedConfig(rounds=config.rounds), outs, out)


def read(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def facts(out):
    return json.loads((out / "facts.json").read_text())


def test_workers_come_to_what_the_pure_step_says(pool, shards, worker):
    config, outs = worker("whole", WORKERS)
    (codes,) = pool.run(together, 1, config, shards, outs)
    assert codes == {"a": 0, "b": 0, "c": 0}
    out, told = merged(config, outs)
    assert [r["round"] for r in told["rounds"]] == [1, 2, 3, 4]
    assert all(
        r["absent"] == [] and r["weights"] == pytest.approx(dict.fromkeys(WORKERS, 1 / 3)) for r in told["rounds"]
    )
    (wanted,) = pool.run(lanes, 1, config, shards, WORKERS)
    found, alone = (load_file(f / "adapter_model.safetensors") for f in (out, outs["a"]))
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm(), name
        assert (alone[name] - value).norm() > 1e-2 * value.norm(), "the workers differ from their average"
    assert read_provenance(out).trained_tokens == 3 * 20 * 256
    assert [facts(out)["rounds_missed"] for out in outs.values()] == [[], [], []]


@pytest.mark.parametrize(
    "after", [pytest.param(a, marks=pytest.mark.slow) for a in ("metrics.jsonl", "handed-in/0001/b")] + ["round-0002"]
)
def test_a_worker_that_is_killed_and_run_again_changes_no_byte(pool, shards, worker, unbroken, after):
    config, again = worker("again")
    (codes,) = pool.run(together, 1, config, shards, again, "b", after)
    assert codes == {"a": 0, "b": 0}
    assert read(merged(config, again)[0]) == unbroken
    assert facts(again["b"])["rounds_missed"] == []


@pytest.mark.slow
def test_moments_in_8_bits_stay_with_a_worker_that_is_killed(pool, shards, worker):
    """Rank 64 makes factors wide enough to be held in a byte a value."""
    came_to = []
    for name, kill in (("whole", ""), ("again", "b")):
        config, outs = worker(name, optimizer=Optimizer.adamw_8bit, learning_rate=1e-3, lora={"lora_rank": 64})
        (codes,) = pool.run(together, 1, config, shards, outs, kill, "round-0002")
        assert codes == {"a": 0, "b": 0}
        came_to.append(read(merged(config, outs)[0]))
    assert came_to[0] == came_to[1]


def test_a_round_goes_on_without_a_dead_worker_whose_next_life_joins_the_current_one(pool, shards, worker):
    config, outs = worker("dead", wait_s=2.0)
    (codes,) = pool.run(together, 1, config, shards, outs, "b", "round-0001", True)
    assert codes == {"a": 0}, "the other one went on alone"
    (codes,) = pool.run(together, 1, config, shards, {"b": outs["b"]})
    assert codes == {"b": 0}
    missed = facts(outs["b"])["rounds_missed"]
    assert missed
    assert set(missed) <= {2, 3}
    _, told = merged(config, outs)
    assert [r["absent"] for r in told["rounds"] if r["round"] in missed] == [["b"]] * len(missed)
    assert told["rounds"][-1]["absent"] == []
    assert set(told["rounds"][-1]["weights"]) == {"a", "b"}


@pytest.mark.slow
def test_where_one_fits_at_a_time_they_make_room_and_come_to_the_same_bytes(pool, shards, worker, unbroken):
    config, outs = worker("alone", patience_s=0.2)
    (lives,) = pool.run(one_at_a_time, 1, config, shards, outs)
    assert all(2 <= n <= 5 for n in lives.values()), lives
    assert read(merged(config, outs)[0]) == unbroken


@pytest.mark.slow
def test_each_worker_may_be_several_processes(pool, shards, worker, recipe):
    config, outs = worker("ranks", ["a"])
    plain = recipe("ddp", 2, epochs=4)
    config.strategy, config.label = plain.strategy, "a"
    told = pool.run(train_worker, 2, config, shards["a"], outs["a"])
    assert [t["num_rounds"] for t in told] == [4, 4]
    _, told = merged(config, outs)
    assert [r["weights"] for r in told["rounds"]] == [{"a": 1.0}] * 4
