"""Who is chosen among trials: the best by development data, unless a smaller one can't be told from it."""

import math

import numpy as np
import pytest

from qlora_dist.config.sweep import TrialConfig
from qlora_dist.config.train import LoraConfig
from qlora_dist.errors import DataError
from qlora_dist.evaluate.documents import Document
from qlora_dist.evaluate.trials import choose_among


def documents(
    level: float, *, noise: float = 0.0, seed: int = 0, general: float = 1.0, num: int = 60
) -> list[Document]:
    """Documents of 100 bytes each, whose bits per byte lie about `level`; those of `general` at `general`."""
    luck = np.random.default_rng(7).normal(0, 0.3, num)
    own = np.random.default_rng(seed).normal(0, noise, num) if noise else np.zeros(num)
    common = {"split": "validation", "tokens": 10, "bytes": 100}
    found = [
        Document(
            domain="legal", record=f"l{i}", cluster=f"c{i // 2}", nll_bits=100 * (level + luck[i] + own[i]), **common
        )
        for i in range(num)
    ]
    return [*found, Document(domain="general", record="g", cluster="g", nll_bits=100 * general, **common)]


def trial(name: str, rank: int) -> TrialConfig:
    return TrialConfig(name=name, lora=LoraConfig(lora_rank=rank))


def choose(found: dict[str, list[Document]], ranks: dict[str, int], max_forgetting: float = 0.1) -> dict:
    trials = [trial(name, ranks[name]) for name in found]
    return choose_among(trials, found, documents(2.0), "legal", max_forgetting)


def test_a_clear_best_is_chosen_though_it_is_larger():
    verdict = choose(
        {"small": documents(1.6, noise=0.02, seed=1), "large": documents(1.4, noise=0.02, seed=2)},
        {"small": 4, "large": 64},
    )
    assert (verdict["winner"], verdict["best"]) == ("large", "large")
    assert "the cheapest is worse, small (+0.19" in verdict["reason"]
    small, large = verdict["trials"]
    assert small["over_best_low"] > 0.15
    assert small["p_holm"] < 0.05
    assert large["over_best"] == 0.0
    assert large["low"] < large["validation_bits_per_byte"] < large["high"]


def test_a_trial_without_a_rival_is_said_to_have_none():
    alone = choose({"r8": documents(1.4)}, {"r8": 8})
    assert alone["reason"] == "r8 is the only one that came to its end, and forgets at most 0.1 bits per byte."
    found = {"r4": documents(1.5, general=1.5), "r8": documents(1.6)}
    assert (
        choose(found, {"r4": 4, "r8": 8})["reason"] == "r8 is the only one of 2 that forgets at most 0.1 bits per byte."
    )
    worst = choose({"r4": documents(1.5, general=1.5)}, {"r4": 4})
    assert worst["reason"] == "The only trial at its end forgets more than 0.1 bits per byte of general text."


def test_of_those_not_distinguishable_from_the_best_the_smallest_is_chosen_and_it_is_said():
    found = {
        "r4": documents(1.401, noise=0.2, seed=1),
        "r8": documents(1.402, noise=0.2, seed=2),
        "r64": documents(1.35, noise=0.2, seed=3),
    }
    verdict = choose(found, {"r4": 4, "r8": 8, "r64": 64})
    assert verdict["best"] == "r64"
    assert verdict["winner"] == "r4"
    assert "not distinguishable from the cheapest, r4 (" in verdict["reason"]
    assert verdict["reason"].endswith("), which is preferred.")
    assert verdict["reason"].count("r4") == 1, "it is said once"


def test_the_cheapest_that_is_spoken_of_is_the_best_of_its_size():
    found = {
        "bad": documents(1.9, noise=0.02, seed=1),
        "good": documents(1.401, noise=0.02, seed=2),
        "large": documents(1.4, noise=0.02, seed=3),
    }
    verdict = choose(found, {"bad": 4, "good": 4, "large": 64})
    assert verdict["winner"] == "good"
    assert "not distinguishable from the cheapest, good (" in verdict["reason"]


def test_a_middle_one_is_chosen_when_only_the_cheapest_is_clearly_worse():
    found = {
        "r4": documents(1.9, noise=0.02, seed=1),
        "r8": documents(1.4005, noise=0.02, seed=2),
        "r64": documents(1.4, noise=0.02, seed=3),
    }
    verdict = choose(found, {"r4": 4, "r8": 8, "r64": 64})
    assert verdict["winner"] == "r8"
    assert "the cheapest is worse, r4" in verdict["reason"]


def test_who_forgets_too_much_is_not_chosen_however_good_it_is():
    found = {"good": documents(1.2, general=1.3), "tame": documents(1.6, general=1.05)}
    verdict = choose(found, {"good": 4, "tame": 8})
    assert verdict["winner"] == "tame"
    assert [row["forgets_too_much"] for row in verdict["trials"]] == [True, False]
    assert choose(found, {"good": 4, "tame": 8}, max_forgetting=0.4)["winner"] == "good"
    all_forget = choose(found, {"good": 4, "tame": 8}, max_forgetting=0.01)
    assert all_forget["winner"] == "tame"
    assert all_forget["reason"].startswith("All 2 trials forget more than 0.01")


def test_without_enough_documents_the_best_is_taken_and_nothing_is_claimed():
    found = {"a": documents(1.5, num=4), "b": documents(1.4, num=4)}
    trials = [trial("a", 4), trial("b", 8)]
    verdict = choose_among(trials, found, documents(2.0, num=4), "legal", 0.1)
    assert verdict["winner"] == "b"
    assert "too few documents" in verdict["reason"]


def test_a_lost_trial_never_wins_and_reads_none():
    verdict = choose({"lost": documents(math.nan), "kept": documents(1.9)}, {"lost": 1, "kept": 8})
    assert verdict["winner"] == "kept"
    assert verdict["trials"][0]["validation_bits_per_byte"] is None


def test_trials_scored_on_other_documents_are_refused():
    with pytest.raises(DataError, match="different documents"):
        choose({"a": documents(1.5, num=10)}, {"a": 4})


def test_one_in_twenty_equal_sweeps_at_most_calls_a_smaller_one_worse():
    """Ten trials that are alike: Holm keeps the share of sweeps with any false claim at 5 % or below, about."""
    wrong = 0
    for sweep in range(40):
        found = {f"t{i}": documents(1.5, noise=0.1, seed=100 * sweep + i, num=40) for i in range(6)}
        trials = [trial(name, 4 + i) for i, name in enumerate(found)]
        verdict = choose_among(trials, found, documents(2.0, num=40), "legal", 0.1)
        wrong += verdict["winner"] != "t0"
    assert wrong <= 8, "the best of six is picked by its luck, so a little more than 5 %"
