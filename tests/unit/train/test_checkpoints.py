"""Which checkpoints a save removes: never the one it wrote, nor those of other recipes."""

import pytest
import torch

from qlora_dist.train.checkpoint import STATE_FILE, TENSORS_FILE, Checkpoints

TENSORS = {"a": torch.arange(4.0)}


@pytest.fixture
def kept(tmp_path):
    return Checkpoints(tmp_path, {"lora_rank": 8})


def steps(checkpoints):
    return [checkpoint.step for checkpoint in checkpoints.usable()]


def test_the_newest_two_are_kept(kept):
    for step in (1, 2, 3):
        kept.save(step, TENSORS)
    assert steps(kept) == [3, 2]


def test_a_foreign_one_neither_counts_nor_goes(kept, tmp_path):
    foreign = Checkpoints(tmp_path, {"lora_rank": 16})
    for step in (100, 200):
        foreign.save(step, TENSORS)
    for step in (1, 2, 3):
        kept.save(step, TENSORS)
    assert steps(kept) == [3, 2]
    assert steps(foreign) == [200, 100]


@pytest.mark.parametrize("lost", [STATE_FILE, TENSORS_FILE])
def test_torn_ones_of_a_life_before_take_no_place(kept, lost):
    for step in (100, 200):
        (kept.save(step, TENSORS) / lost).write_text("torn")
    for step in (1, 2, 3):
        kept.save(step, TENSORS)
    assert steps(kept) == [3, 2]


def test_the_same_step_saved_twice_is_the_second(kept):
    kept.save(1, TENSORS)
    kept.save(1, {"a": torch.zeros(4)})
    (found,) = kept.usable()
    assert not found.tensors()["a"].any()
    assert [path.name for path in kept.folder.iterdir()] == ["step-00000001"]
