"""Successive halving: who goes on, who begins, who ends, whatever the order in which results come."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.train.halving import Halving, Result, play, rung_steps, rung_tokens, steps_taken


def halving(num_trials: int, lanes: int, *, eta: int = 3, steps: tuple[int, ...] = (1, 3, 9)) -> Halving:
    return Halving([list(steps)] * num_trials, eta, lanes)


def test_rungs_are_shares_of_the_budget_or_begin_where_they_are_told():
    assert rung_tokens(9000, 3) == [1000, 3000, 9000]
    assert rung_tokens(10_000, 4, 500) == [500, 2000, 8000, 10_000]
    assert rung_tokens(100, 3, 200) == [100]
    assert rung_steps(9, 1000, [1000, 3000, 9000]) == [1, 3, 9]
    assert rung_steps(7, 1500, [1000, 4000, 9000]) == [1, 3, 7]


@pytest.mark.parametrize("num_steps", [9, 26, 27, 90, 100, 1000, 1999])
def test_three_rungs_stand_at_three_steps_whatever_the_budget(num_steps):
    rungs = rung_tokens(num_steps * 2048, 3, tokens_per_step=2048)
    steps = rung_steps(num_steps, 2048, rungs)
    assert steps == [math.ceil(num_steps / 9), math.ceil(num_steps / 3), num_steps]
    ended = play(halving(27, 27, steps=steps), lambda trial, rung: Result(float(trial)))
    assert ended.finishers() == [0, 1, 2], "the best three are compared at the end"


def test_rungs_within_one_step_are_one():
    assert rung_steps(2, 10, rung_tokens(20, 3, tokens_per_step=10)) == [1, 2]
    assert rung_tokens(10, 3, tokens_per_step=10) == [10]
    assert rung_tokens(1000, 3, 301, tokens_per_step=100) == [301, 1000]


def test_with_a_lane_each_it_is_plain_successive_halving():
    ended = play(halving(27, 27), lambda trial, rung: Result(trial * 1.0))
    assert [len(ended.best(rung)) for rung in range(3)] == [27, 9, 3]
    assert ended.finishers() == [0, 1, 2]
    assert sum(steps_taken(ended).values()) == 27 + 9 * 2 + 3 * 6


def test_a_free_lane_goes_to_who_was_promoted_before_it_goes_to_who_is_next():
    made = halving(9, 3)
    made.seat()
    assert made.running == {0: 0, 1: 0, 2: 0}
    for trial, rung in made.advance(made.turns()):
        made.record(trial, rung, Result(-trial))
    made.seat()
    assert made.running == {2: 1, 3: 0, 4: 0}


def test_rounds_end_with_the_first_arrival_and_others_go_on():
    made = Halving([[2, 6], [5, 9]], 3, 2)
    made.seat()
    assert made.turns() == 2
    assert made.advance(2) == [(0, 0)]
    made.record(0, 0, Result(1.0))
    made.seat()
    assert made.running == {1: 0}
    assert made.turns() == 3


def test_who_forgets_too_much_or_is_lost_does_not_go_on():
    def result(trial: int, rung: int) -> Result:
        return {0: Result(0.1, passes=False), 1: Result(math.inf)}.get(trial, Result(float(trial)))

    ended = play(halving(9, 9), result)
    assert ended.best(1) == [2, 3, 4], "one in three goes on, but not those"
    assert ended.finishers() == [2]


def test_who_begins_to_forget_makes_room_for_who_does_not():
    """The leader passes at the first rung alone: it must not be shipped while others wait that may be."""

    def result(trial: int, rung: int) -> Result:
        return Result(float(trial), passes=trial > 0 or rung == 0, forgetting=0.0 if trial else float(rung))

    ended = play(halving(4, 4), result)
    assert ended.finishers() == [1]
    ended = play(halving(3, 3), lambda trial, rung: Result(math.inf if (trial, rung) == (0, 2) else float(trial)))
    assert ended.finishers() == [0, 1], "the first is lost in its last steps"


def test_where_all_forget_too_much_the_one_that_forgets_least_comes_to_the_end():
    ended = play(halving(4, 4), lambda t, r: Result(float(t), passes=False, forgetting=4.0 - t))
    assert ended.finishers() == [3]


def test_someone_always_reaches_the_end_if_anyone_trains_at_all():
    assert play(halving(2, 2), lambda t, r: Result(float(-t))).finishers() == [1]
    assert play(halving(4, 4), lambda t, r: Result(float(t), passes=t == 3)).finishers() == [3]
    assert play(halving(4, 4), lambda t, r: Result(float(t), passes=False)).finishers() == [0]
    assert play(halving(3, 1), lambda t, r: Result(math.inf)).finishers() == []


@given(
    num_trials=st.integers(1, 30),
    lanes=st.integers(1, 12),
    eta=st.integers(2, 4),
    seed=st.integers(0, 10_000),
)
def test_any_halving_ends_with_every_trial_begun_lanes_kept_and_decisions_repeatable(num_trials, lanes, eta, seed):
    draw = random.Random(seed)
    steps = [sorted(draw.sample(range(1, 40), 3)) for _ in range(num_trials)]
    values = {(t, r): Result(draw.random(), draw.random() > 0.1) for t in range(num_trials) for r in range(3)}

    def played() -> Halving:
        made, most = Halving(steps, eta, lanes), 0
        made.seat()
        while made.running:
            most = max(most, len(made.running))
            for trial, rung in made.advance(made.turns()):
                assert (trial, rung) not in made.results, "nothing is trained twice"
                assert rung == 0 or (trial, rung - 1) in made.results, "no rung is left out"
                made.record(trial, rung, values[trial, rung])
            made.seat()
        assert most <= lanes
        return made

    one, other = played(), played()
    assert one.results == other.results
    assert {t for t, r in one.results if r == 0} == set(range(num_trials))
    assert one.finishers()
    for rung in range(2):
        ranked = one.best(rung)
        allowed = [t for t in ranked[: len(ranked) // eta] if one.results[t, rung].passes]
        assert set(allowed) <= set(one.best(rung + 1)), "at the end the best of each rung have gone on"


@pytest.mark.parametrize("lanes", [1, 4, 9, 27])
def test_the_best_trial_wins_when_rungs_tell_the_truth(lanes):
    order = list(range(27))
    random.Random(3).shuffle(order)
    ended = play(halving(27, lanes), lambda trial, rung: Result(float(order[trial])))
    assert ended.best(2)[0] == order.index(0)
