"""How several adapters become one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlora_dist.config.fields import execution, setting
from qlora_dist.errors import bad_value


class MergeMethod(Enum):
    """The rule that makes one adapter out of several; `adapters.methods` names each one's paper."""

    concat = "concat"
    svd = "svd"
    ties = "ties"
    dare = "dare"
    tsv = "tsv"
    iso = "iso"
    knots_ties = "knots_ties"
    linear_ab = "linear_ab"
    regmean = "regmean"
    learned = "learned"
    greedy_soup = "greedy_soup"


class MergeWeights(Enum):
    """What an adapter's share in the merge is proportional to; `given` takes `shard_weights` as they are."""

    tokens = "tokens"
    uniform = "uniform"
    inverse_loss = "inverse_loss"
    given = "given"


CALIBRATED = frozenset({MergeMethod.regmean, MergeMethod.learned, MergeMethod.greedy_soup})
"""Merges that look at rows, and so need the base."""


class LearnedPer(Enum):
    """What `learned` finds a weight for: each adapter, or each adapter in each module."""

    adapter = "adapter"
    module = "module"


@dataclass(kw_only=True, slots=True)
class OuterConfig:
    """The outer Nesterov step of workers that are averaged from a shared start (DiLoCo, arXiv 2311.08105)."""

    learning_rate: float = setting(0.9, above=0, at_most=2)
    momentum: float = setting(0.5, at_least=0, below=1)


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """The merge method, the weights of its parts (they sum to one) and the scale of the whole.

    `rank` and `energy` bound the lora_rank of the result (0: no bound); `density` is the share of entries that
    `ties` and `knots_ties` keep, `drop` the share that `dare` drops, by `seed`. `regmean`, `learned` and `greedy_soup`
    look at `calibration_rows` rows of each part; `gram_keep` is RegMean's alpha, `steps`, `learning_rate` and
    `learned_per` are of `learned`.

    With `num_parts`, the modules are divided over so many nodes, and joined to the same bytes.

    With `compare`, these methods at these `scales`, and each part alone, are scored on development data; the one
    shipped wins the most among those that forget at most `max_forgetting` bits per byte of general text.

    With `every_steps`, the adapters train together apart: they meet in rounds of at most that many steps, and go on
    from their average, moved by the `outer` step. A round waits `wait_s` for a worker that gives no sign of life; a
    worker that waits `patience_s` for one that isn't running gives its place away, and is run again.
    """

    method: MergeMethod = setting(MergeMethod.concat)
    weights: MergeWeights = setting(MergeWeights.tokens)
    scale: float = setting(1.0, above=0)
    rank: int = setting(0, at_least=0)
    energy: float = setting(0.0, at_least=0, at_most=1)
    density: float = setting(0.2, above=0, at_most=1)
    drop: float = setting(0.5, at_least=0, below=1)
    seed: int = setting(0, at_least=0)
    calibration_rows: int = setting(32, at_least=1)
    gram_keep: float = setting(0.9, at_least=0, at_most=1)
    steps: int = setting(30, at_least=1)
    learning_rate: float = setting(0.05, above=0)
    learned_per: LearnedPer = setting(LearnedPer.adapter)
    workers: int = execution(0, at_least=0)
    num_parts: int = execution(1, at_least=1)
    compare: list[MergeMethod] = setting(list)
    scales: list[float] = setting(list, above=0, at_most=10)
    max_forgetting: float = setting(0.1, at_least=0)
    every_steps: int = setting(0, at_least=0)
    outer: OuterConfig = setting(OuterConfig)
    wait_s: float = execution(600.0, above=0)
    patience_s: float = execution(30.0, above=0)

    def check(self, key: str) -> None:
        """Refuses a bound on an exact sum, and a truncation without one."""
        bounded = self.rank > 0 or self.energy > 0
        methods = self.compare or [self.method]
        if MergeMethod.greedy_soup in self.compare:
            wanted = "methods that leave the development data to the referee"
            raise bad_value(f"{key}.compare", "greedy_soup", wanted, f"Set {key}.method=greedy_soup without a referee.")
        if MergeMethod.svd in methods and not bounded:
            repair = f"Set {key}.rank=16 or {key}.energy=0.99."
            raise bad_value(f"{key}.rank", self.rank, "a bound for method svd, by rank or energy", repair)
        if set(methods) == {MergeMethod.concat} and bounded:
            repair = f"Set {key}.method=svd for the best lower rank."
            raise bad_value(f"{key}.rank", self.rank, "0, with energy 0: concat is the exact sum", repair)
        if self.num_parts > 1 and (self.compare or self.every_steps or self.method in CALIBRATED):
            wanted = "1 with a referee, with rounds, or with a method that looks at data"
            raise bad_value(f"{key}.num_parts", self.num_parts, wanted)
        if self.every_steps:
            self._check_rounds(key)

    def _check_rounds(self, key: str) -> None:
        if self.compare:
            raise bad_value(
                f"{key}.compare", self.compare[0].name, f"nothing with {key}.every_steps: one adapter is made"
            )
        if self.method is not MergeMethod.concat:
            wanted = f"concat with {key}.every_steps: the workers are averaged from a shared start"
            raise bad_value(f"{key}.method", self.method.name, wanted)
        if self.weights in (MergeWeights.inverse_loss, MergeWeights.given):
            raise bad_value(f"{key}.weights", self.weights.name, f"tokens or uniform with {key}.every_steps")
