"""Killed at any moment and run again, a training ends with the bytes it would have ended with."""

import json
import logging
import os
import signal
import time

import pytest
from safetensors.torch import load_file

from qlora_dist.config.train import Optimizer
from qlora_dist.runtime import log
from qlora_dist.testing import RankPool
from qlora_dist.train import train_adapter
from tests.dist.drill import digest, drill, live


def read(out):
    return (out / "adapter_model.safetensors").read_bytes()


def distance(a, b):
    a, b = load_file(a / "adapter_model.safetensors"), load_file(b / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


@pytest.fixture
def folder(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


@pytest.fixture
def whole(pool, inputs, folder, recipe):
    """An uninterrupted training of 20 steps on one process."""
    out = folder("whole")
    pool.run(train_adapter, 1, recipe(epochs=4), inputs, out)
    return out


@pytest.fixture(scope="module")
def nursery():
    """A process that never trains itself: what is forked from it has no threads and no locks of an earlier training."""
    with RankPool() as nursery:
        yield nursery


def test_killed_lives_end_in_the_same_bytes(nursery, inputs, folder, recipe, whole):
    out = folder("out")
    config = recipe(epochs=4, checkpoint_every_s=0.0)
    ((ends, codes),) = nursery.run(drill, 1, config, inputs, out, 6, [1], 1.0)
    assert codes == [0]
    assert ends == {digest(whole)}
    assert not (out / "checkpoints").exists()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21)), "each step stands once in the metrics"


@pytest.mark.slow
def test_thirty_four_kills_over_several_world_sizes(pool, nursery, inputs, folder, recipe):
    same, changed, plain = folder("same"), folder("changed"), folder("plain")
    config = recipe(epochs=12, checkpoint_every_s=0.0)
    pool.run(train_adapter, 1, recipe(epochs=12), inputs, plain)
    ((ends, codes),) = nursery.run(drill, 1, config, inputs, same, 14, [1], 1.2, 1, timeout_s=300)
    assert codes == [0]
    assert ends == {digest(plain)}
    two, plain_two = folder("two"), folder("plain_two")
    pool.run(train_adapter, 2, recipe("ddp", 2, epochs=12), inputs, plain_two)
    ((ends, codes),) = nursery.run(drill, 1, config, inputs, two, 6, [2], 2.5, 3, timeout_s=300)
    assert codes == [0, 0]
    assert ends == {digest(plain_two)}
    ((_, codes),) = nursery.run(drill, 1, config, inputs, changed, 14, [2, 1, 4, 1], 2.5, 2, timeout_s=300)
    assert codes == [0]
    assert distance(changed, plain) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "stage", "kills"), [("fsdp", 2, 8), ("deepspeed", 3, 4)])
def test_kills_of_a_divided_base_over_several_world_sizes(
    pool, nursery, inputs, folder, recipe, strategy, stage, kills
):
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed")
    plain, out = folder("plain"), folder("out")
    pool.run(train_adapter, 1, recipe(epochs=8), inputs, plain)
    config = recipe(strategy, 2, epochs=8, checkpoint_every_s=0.0)
    config.strategy.zero_stage = stage
    ((_, codes),) = nursery.run(drill, 1, config, inputs, out, kills, [2, 4, 2], 6.0, 4, timeout_s=300)
    assert codes == [0, 0]
    assert distance(out, plain) < 1e-2
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41)), "each step stands once in the metrics"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_request_to_stop_ends_the_step_and_says_75(nursery, inputs, folder, recipe, whole, number):
    out = folder("out")
    config = recipe(epochs=4)
    (codes,) = nursery.run(live, 1, config, inputs, out, 1, 0.0, number, True)
    assert codes == [75]
    assert list((out / "checkpoints").glob("step-*"))
    assert not (out / "adapter_model.safetensors").exists()
    (codes,) = nursery.run(live, 1, config, inputs, out, 1)
    assert codes == [0]
    assert read(out) == read(whole)


@pytest.mark.parametrize("when", ["in the sum", "after it"])
def test_a_request_to_one_rank_stops_all_of_them_whenever_it_comes(pool, inputs, folder, recipe, when):
    out = folder("out")
    said = pool.run(stopped_in_step_3, 2, recipe("ddp", 2, epochs=4), inputs, out, when)
    assert said == ["Stopped on request after step 4. Run the same command to continue."] * 2
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]


def stopped_in_step_3(config, inputs, out, when):
    """Rank 1 gets a signal in its third step: while the ranks add up, or in the optimizer's step."""
    from qlora_dist.errors import Preempted
    from qlora_dist.train import step as steps
    from qlora_dist.train.strategies.ddp import ReplicatedBase

    place, name = (ReplicatedBase, "sum_over_ranks") if when == "in the sum" else (steps, "update")
    plain, calls = getattr(place, name), []

    def signalled(*args):
        plain(*args)
        at_work = name == "update" or len(args[1]) == 3
        calls.extend([1] if at_work else [])
        if at_work and len(calls) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(place, name, signalled)
    try:
        train_adapter(config, inputs, out)
    except Preempted as stop:
        return str(stop)
    finally:
        setattr(place, name, plain)
    return "it was not heard"


def test_no_rank_leaves_before_the_checkpoint_is_written(pool, inputs, folder, recipe):
    """torchrun ends a node's other processes once one of them has left, rank 0 in the middle of writing too."""
    assert pool.run(leave, 2, recipe("ddp", 2, epochs=4), inputs, folder("out")) == [1, 1]


def leave(config, inputs, out):
    """Is stopped in its first step, whose checkpoint is slow to write; returns how many there are when it leaves."""
    from qlora_dist.train.checkpoint import Checkpoints

    plain = Checkpoints.save

    def save(self, *args, **kwargs):
        time.sleep(1.0)
        return plain(self, *args, **kwargs)

    Checkpoints.save = save
    try:
        train_until(config, inputs, out, 1)
        return len(list((out / "checkpoints").glob("step-*")))
    finally:
        Checkpoints.save = plain


def stopped_after(pool, inputs, out, config, world_size=1, step=8):
    """Leaves the state of a life that was killed after `step` steps."""
    from dataclasses import replace

    config = replace(config, strategy=replace(config.strategy, world_size=world_size))
    pool.run(train_until, world_size, config, inputs, out, step)
    return out


def train_until(config, inputs, out, step):
    """Trains, and dies as by a signal once `step` steps are taken."""
    from qlora_dist.errors import Preempted
    from qlora_dist.train import step as steps

    plain = steps.Stepper.take

    def take(self, places, number):
        results = plain(self, places, number)
        self.wants_stop = self.asked_to_stop or number + 1 == step
        return results

    steps.Stepper.take = take
    try:
        train_adapter(config, inputs, out)
    except Preempted:
        return
    finally:
        steps.Stepper.take = plain
    raise AssertionError("it was to stop")


def test_torn_checkpoint_is_named_and_the_one_before_is_used(pool, inputs, folder, recipe, whole, caplog):
    out = folder("out")
    stopped_after(pool, inputs, out, recipe(epochs=4, checkpoint_every_s=0.0))
    newest = sorted((out / "checkpoints").glob("step-*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    (facts,) = pool.run(train_adapter, 1, recipe(epochs=4), inputs, out)
    assert facts["resumed_after_step"] == 7
    assert read(out) == read(whole)


def test_checkpoint_of_another_recipe_is_not_continued(pool, inputs, folder, recipe):
    out = folder("out")
    stopped_after(pool, inputs, out, recipe(epochs=4))
    (facts,) = pool.run(train_adapter, 1, recipe(epochs=4, learning_rate=0.02), inputs, out)
    assert facts["resumed_after_step"] == 0


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_checkpoint_of_four_ranks_continues_on_fewer(pool, inputs, folder, recipe, whole, world_size):
    out = folder("out")
    stopped_after(pool, inputs, out, recipe("fsdp", epochs=4), world_size=4)
    strategy = "fsdp" if world_size > 1 else "ddp"
    facts = pool.run(train_adapter, world_size, recipe(strategy, world_size, epochs=4), inputs, out)[0]
    assert facts["resumed_after_step"] == 8
    assert distance(out, whole) < 1e-2


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_moments_in_8_bits_continue_on_every_rank(pool, inputs, folder, recipe, strategy):
    config = recipe(strategy, 2, lora={"lora_rank": 128}, optimizer=Optimizer.adamw_8bit, learning_rate=2e-3, epochs=2)
    whole, out = folder("whole"), folder("out")
    pool.run(train_adapter, 2, config, inputs, whole)
    stopped_after(pool, inputs, out, config, world_size=2, step=3)
    facts = pool.run(train_adapter, 2, config, inputs, out)[0]
    assert facts["resumed_after_step"] == 3
    assert read(out) == read(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "said"), [("absent", "waited 4 s at start.*1"), ("hangs", "waiting for rank 1")])
def test_rank_that_is_missing_is_named(how, said, recipe, inputs, folder, tmp_path):
    config = recipe("ddp", 2)
    config.strategy.timeout_s = 4
    with RankPool() as own, pytest.raises(AssertionError, match=f"(?s)PeerLost: .*{said}"):
        own.run(lose_a_rank, 2, config, inputs, folder("out"), how)
    if how == "hangs":
        told = "Step 3 has taken 4 s: waiting for rank 1 (rank 0 2 waiting, rank 1 2 computing)"
        assert told in (tmp_path / "out" / "rank0.log").read_text()


@pytest.mark.slow
def test_a_rank_without_memory_says_so_itself(recipe, inputs, folder):
    """It isn't a lost neighbour, after which the same command would be run again and again."""
    wanted = r"(?s)TrainError: Step 3: CUDA out of memory.* Lower train\.micro_batch_tokens"
    with RankPool() as own, pytest.raises(AssertionError, match=wanted):
        own.run(lose_a_rank, 2, recipe("ddp", 2), inputs, folder("out"), "full")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_meet_where_tensors_travel_by_another_way(pool, recipe, inputs, folder, strategy):
    """On GPUs tensors travel by NCCL, which knows no barrier that names who is missing."""
    facts = pool.run(over_two_ways, 2, recipe(strategy, 2), inputs, folder("out"))
    assert facts[0]["num_steps"] == 5


def over_two_ways(config, inputs, out):
    from qlora_dist.train import processes

    plain = processes.backends
    processes.backends = lambda: "cuda:gloo,cpu:gloo"
    try:
        return train_adapter(config, inputs, out)
    finally:
        processes.backends = plain


def lose_a_rank(config, inputs, out, how):
    """Rank 1 hangs before the first meeting or in the third step, or is out of memory there."""
    import torch

    from qlora_dist.train import processes
    from qlora_dist.train import step as steps

    plain = steps.Stepper.accumulate

    def hang(self, places, counts):
        if places[0] == 2:
            if how == "full":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            time.sleep(60)
        return plain(self, places, counts)

    if os.environ["RANK"] == "1":
        if how == "absent":
            processes.meet = lambda *_: time.sleep(60)
        else:
            steps.Stepper.accumulate = hang
    log.addHandler(logging.FileHandler(out / f"rank{os.environ['RANK']}.log"))
    train_adapter(config, inputs, out)
