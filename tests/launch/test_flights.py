"""Thousands of flights: whatever befalls a cluster, no record is lost or counted twice, and the plan ends.

A flight that goes wrong prints its seed and what happened; `fly_ray(seed)` flies it again, the same to the byte.
"""

from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest

from qlora_dist.artifacts import owner
from qlora_dist.artifacts.store import Store
from tests.launch.flight.flight import Flight, fly_ray


def test_some_flights_on_ray():
    require_good(fly_ray, range(150))


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 5))
def test_flights_on_ray_by_the_thousand(batch: int):
    require_good(fly_ray, range(batch * 500, (batch + 1) * 500))


def require_good(fly: Callable[[int], Flight], seeds: range) -> None:
    wrong = [flight for seed in seeds if (flight := fly(seed)).wrong]
    assert not wrong, "\n\n".join(map(str, wrong[:3]))


def test_without_faults_every_flight_arrives_at_once():
    for seed in range(20):
        flight = fly_ray(seed, num_faults=0)
        assert not flight.second, flight


def test_a_flight_is_the_same_again():
    first, again = fly_ray(7, num_faults=5), fly_ray(7, num_faults=5)
    assert (first.happened, first.first, first.seconds) == (again.happened, again.first, again.seconds)
    assert first.happened


def test_a_word_of_failure_does_not_outlive_what_a_lost_process_finished():
    flight = fly_ray(40692)
    assert "adapter/0" in {name for name, state in flight.first.items() if not state.is_good}
    assert not flight.wrong, flight


def no_owner(self: Store, artifact_id: str, job: str, *, resumes: bool = False):
    self.partial(artifact_id).mkdir(parents=True, exist_ok=True)
    return nullcontext()


BREAKAGES: dict[str, Callable[[], list]] = {
    "nobody owns anything": lambda: [mock.patch.object(Store, "owned", no_owner)],
    "a slow owner goes on": lambda: [
        mock.patch.object(Store, "lost_to", lambda self, artifact_id: None),
        mock.patch.object(owner, "beat", lambda folder, me: True),
    ],
    "what others finished is not waited for": lambda: [
        mock.patch("qlora_dist.pipeline.run.sees_inputs", lambda plan, node: True)
    ],
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_rule_that_is_broken_is_noticed(breakage: str):
    """The simulation would be worth nothing if it flew as well without what it is to prove."""
    patches = BREAKAGES[breakage]()
    for patch in patches:
        patch.start()
    try:
        wrong: list[Flight] = []
        for seed in range(400):
            flight = fly_ray(seed, num_faults=4)
            wrong += [flight] if flight.wrong or is_failed_by(flight) else []
            if wrong:
                break
    finally:
        for patch in patches:
            patch.stop()
    assert wrong


def is_failed_by(flight: Flight) -> bool:
    return any("is not finished" in line for line in flight.happened)
