"""The folder where workers meet: when a round closes, who is waited for, and what a late one goes on from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.artifacts.owner import owned
from qlora_dist.config.merge import OuterConfig
from qlora_dist.config.stages import RoundsConfig, WorkerConfig
from qlora_dist.errors import Preempted
from qlora_dist.model.adapter import Provenance, write_provenance
from qlora_dist.pipeline.meeting import MeetingFolder, ends_of_rounds

KEY = "base_model.model.layer.lora_A.weight"


@pytest.fixture
def meet(tmp_path):
    """Returns a function that makes one worker's view of the folder."""

    def make(label, wait_s=60.0, patience_s=0.0):
        rounds = RoundsConfig(workers=["a", "b"], every_steps=5, outer=OuterConfig(learning_rate=1.0, momentum=0.0))
        place = {"meeting": str(tmp_path / "meeting"), "wait_s": wait_s, "patience_s": patience_s}
        return MeetingFolder(WorkerConfig(label=label, rounds=rounds, **place), {"a": 20, "b": 20})

    return make


def writes(value: float):
    def write(folder):
        pair = {KEY: torch.full((2, 3), value), KEY.replace("_A", "_B"): torch.full((3, 2), value)}
        save_file(pair, folder / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(told))
        write_provenance(folder, Provenance("base", "", "b", "t", "nf4", "float32", 999))

    return write


def value(answer) -> float:
    return float(load_file(answer.folder / "adapter_model.safetensors")[KEY][0, 0])


def begun(meet, **waits):
    a, b = meet("a", **waits), meet("b", **waits)
    a.hand_in(0, writes(0.0))
    b.hand_in(0, writes(7.0))
    return a, b


def test_rounds_end_together_and_use_up_each_budget():
    assert ends_of_rounds({"a": 100, "b": 100}, 25) == {"a": [0, 25, 50, 75, 100], "b": [0, 25, 50, 75, 100]}
    assert ends_of_rounds({"a": 110, "b": 52}, 25) == {"a": [0, 22, 44, 66, 88, 110], "b": [0, 10, 21, 31, 42, 52]}
    few = ends_of_rounds({"a": 100, "b": 3}, 10)
    assert few["b"] == [0, 1, 2, 3]
    assert few["a"][-1] == 100


def test_the_first_start_is_everyones(meet):
    a, b = begun(meet)
    assert value(a.ask(0)) == value(b.ask(0)) == 0.0


def test_a_round_closes_when_all_are_there(meet):
    a, b = begun(meet)
    a.hand_in(5, writes(1.0))
    assert a.ask(5) is None
    b.hand_in(5, writes(3.0))
    assert value(b.ask(5)) == pytest.approx(2.0)
    assert value(a.ask(5)) == pytest.approx(2.0)
    assert a.ask(5).step == 5
    assert a.is_due(5)
    assert not a.is_due(6)
    assert not a.is_due(20), "the last round is the merge's"


def test_a_dead_worker_is_waited_for_a_while_and_a_living_one_for_longer(meet):
    a, b = begun(meet, wait_s=0.0)
    a.hand_in(5, writes(1.0))
    with owned(b.folder / "present" / "b", "b"):
        assert a.ask(5) is None, "it lives"
    assert value(a.ask(5)) == pytest.approx(1.0)
    told = json.loads((a.round_folder(1) / "round.json").read_text())
    assert told["absent"] == ["b"]
    a.hand_in(10, writes(5.0))
    a.ask(10)
    assert value(b.catch_up(3)) == pytest.approx(5.0), "its next life joins the current round"
    assert b.catch_up(3).step == 10
    assert b.facts()["rounds_missed"] == [1, 2]


def test_a_life_that_was_in_the_round_takes_its_steps_again(meet):
    a, b = begun(meet)
    a.hand_in(5, writes(1.0))
    b.hand_in(5, writes(3.0))
    a.ask(5)
    a.hand_in(10, writes(4.0))
    assert b.catch_up(3) is None, "it goes on to step 5"
    b.hand_in(5, writes(3.0))
    assert b.ask(5).step == 5
    assert value(b.ask(5)) == pytest.approx(2.0)


def test_room_is_made_for_who_has_not_run_and_not_for_the_dead(meet, tmp_path):
    a, b = begun(meet)
    a.hand_in(5, writes(1.0))
    assert a.makes_room(), "b was never here"
    with b.attended():
        assert not meet("a").makes_room(), "b runs"
    assert meet("a").makes_room(), "b stopped, to be run again"
    with pytest.raises(Preempted), b.attended():
        raise Preempted("stop")
    assert meet("a").makes_room()
    with pytest.raises(ValueError, match="broken"), b.attended():
        raise ValueError("broken")
    assert not meet("a").makes_room(), "b failed"
    assert not meet("a", patience_s=60.0).makes_room()


def test_old_rounds_keep_their_word_and_lose_their_weights(meet):
    a, b = begun(meet)
    for number, step in enumerate((5, 10, 15), 1):
        a.hand_in(step, writes(number))
        b.hand_in(step, writes(number))
        a.ask(step)
    assert not (a.round_folder(1) / "adapter_model.safetensors").exists()
    assert (a.round_folder(1) / "round.json").exists()
    assert (a.round_folder(2) / "adapter_model.safetensors").exists()
    assert [p.name for p in (a.folder / "handed-in").iterdir()] == ["0003"]
