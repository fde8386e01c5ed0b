"""One step of the lanes: what is heard while it runs, what it weighs, and what it can't be taken without."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qlora_dist.config.model import Dtype, ModelConfig
from qlora_dist.train.course import Course
from qlora_dist.train.engine import Engine
from qlora_dist.train.loop import Loop
from qlora_dist.train.step import gradient
from qlora_dist.train.strategies.ddp import ReplicatedBase


def test_a_wish_that_comes_while_ranks_add_up_is_heard_a_step_later(make_engine, make_lane):
    stepper = make_engine(make_lane()).stepper
    plain = stepper.strategy.sum_over_ranks

    def interrupted(values):
        plain(values)
        stepper.asked_to_stop = True

    stepper.strategy.sum_over_ranks = interrupted
    stepper.take({0: 0})
    assert not stepper.wants_stop
    stepper.take({0: 1})
    assert stepper.wants_stop


def test_a_share_of_a_million_targets_is_not_lost_in_float16(base, make_lane):
    """A gradient is that of the sum of all targets' losses, by their number: so a number of ours changes its size."""
    found = {}
    for dtype in (Dtype.float32, Dtype.float16):
        lane = make_lane()
        engine = Engine.build(ModelConfig(compute_dtype=dtype), base, [lane], ReplicatedBase())
        for count in (100, 1_000_003):
            engine.stepper.accumulate({0: 0}, {0: count})
            found[dtype, count] = gradient(lane).clone() * count
    exact = found[Dtype.float32, 100]
    for case, value in found.items():
        assert (value - exact).norm() < 0.02 * exact.norm(), case


def test_a_lane_with_a_step_without_targets_ends_before_its_first_and_alone(make_engine, make_lane, rows, tmp_path):
    lanes = [make_lane(name, tokens_per_step=32, micro_batch_tokens=32, epochs=1.0) for name in "ab"]
    trained_BT = np.array(rows.trained_BT)
    trained_BT[lanes[0].budget.rows_of_step(3)] = False
    lanes[0].rows = replace(rows, trained_BT=trained_BT)
    engine = make_engine(*lanes)
    courses = [Course(lane, tmp_path / lane.name) for lane in lanes]
    engine.examine(courses)
    assert "none in step 4" in str(courses[0].error)
    Loop(engine.stepper, courses, 600).run()
    assert [course.step for course in courses] == [0, lanes[1].budget.num_steps]
    assert courses[1].error is None


def test_a_rate_too_small_to_move_anything_is_told_as_that(make_lane, run):
    with pytest.raises(Exception, match=r"raise train\.learning_rate"):
        run(make_lane(learning_rate=1e-12, epochs=1.0))


def test_losses_do_not_depend_on_how_targets_are_weighed(make_engine, make_lane):
    engine = make_engine(make_lane())
    a, b = (engine.stepper.accumulate({0: 0}, {0: count}) for count in (7, 1000))
    assert torch.equal(a, b)
