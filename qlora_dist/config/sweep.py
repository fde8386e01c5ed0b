"""What a sweep varies: lists of values, or named points, of any identity field of `lora` and `train`, and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from qlora_dist.config.fields import check, execution, identity, setting
from qlora_dist.config.train import LoraConfig, Method, StrategyConfig, TrainConfig, check_step, check_supported
from qlora_dist.errors import ConfigError, bad_value, nearest

KEY = "sweep"
MAX_TRIALS = 10_000
SHORT = {"lora_rank": "r", "lora_alpha": "a", "learning_rate": "lr", "seed": "s"}
"""What stands before a value in a trial's name; any other field by its own name."""
RESERVED = ("base",)
"""Names that no point may have: beside the trials' scores stand those of the base."""


class SweepName(Enum):
    """How a sweep walks through its points: not at all, all of them to the end, or bad ones stopped early."""

    none = "none"
    grid = "grid"
    halving = "halving"


@dataclass(kw_only=True, slots=True)
class SweepSettings:
    """How a sweep is walked and chosen from; `SweepConfig` adds a list for each field that can be varied.

    `points` are named points, each combined with every point of the lists. With `halving`, trials stop at *rungs* of
    `first_rung_tokens`, `eta` times as many, and so on (0: the whole budget over `eta` squared), and one in `eta`
    goes on. A trial that forgets more than `max_forgetting` bits per byte of general text neither goes on nor wins.
    Trials are measured on `max_rows` rows of each development set (0: all).
    At most `lanes` train at once in one job (0: as many as memory holds), in at least `jobs` jobs (0: one a shard);
    `job_memory_gb` is the memory that a job has (0: that of this machine's GPU, or of this machine).
    """

    name: SweepName = execution(SweepName.none)
    points: list[dict[str, Any]] = setting(list)
    find_duplicates: bool = execution(True)
    eta: int = setting(3, at_least=2, at_most=16)
    first_rung_tokens: int = setting(0, at_least=0)
    max_forgetting: float = setting(0.1, at_least=0)
    max_rows: int = setting(0, at_least=0)
    lanes: int = execution(0, at_least=0)
    jobs: int = execution(0, at_least=0)
    job_memory_gb: float = execution(0.0, at_least=0)


def _swept_fields() -> dict[str, tuple[type, str]]:
    """Returns the type of every field that can be varied, and the config that holds it."""
    found: dict[str, tuple[type, str]] = {}
    for group, config in (("lora", LoraConfig), ("train", TrainConfig)):
        hints = typing.get_type_hints(config)
        for one in dataclasses.fields(config):
            if one.name != "method" and not one.metadata.get("execution"):
                found[one.name] = (hints[one.name], group)
    return found | {"seed": (int, "")}


FIELDS = _swept_fields()

if TYPE_CHECKING:
    SweepConfig = SweepSettings
else:
    SweepConfig = dataclasses.make_dataclass(
        "SweepConfig",
        [(name, list[kind], setting(list)) for name, (kind, _) in FIELDS.items()],
        bases=(SweepSettings,),
        namespace={"__doc__": "The lists of values that a sweep combines, by field, and how it is walked."},
        kw_only=True,
        slots=True,
    )
    SweepConfig.__module__ = __name__


@dataclass(kw_only=True, slots=True)
class TrialConfig:
    """One point of a sweep: the recipe that it trains, and its name."""

    name: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """The trials that are run, and for each that isn't, the one it is an exact duplicate of."""

    trials: list[TrialConfig]
    duplicates: dict[str, str]


def trials_of(
    sweep: SweepConfig, lora: LoraConfig, train: TrainConfig, seed: int, strategy: StrategyConfig | None = None
) -> Sweep:
    """Returns the trials of a sweep, checked as the fields' own values are, and as a run of each alone would be.

    Raises:
        ConfigError: for no point at all, a point without a name, an unknown field, a value that its field can't have,
            what the strategy (by default that of one process) can't do, or two points of one name.
    """
    if not _given(sweep):
        repair = f"Set {KEY}.lora_rank=[4,8], say, or {KEY}.points."
        raise bad_value(KEY, sweep.name.name, "a list of values, or points", repair)
    made: dict[str, TrialConfig] = {}
    exact = _written_exactly(sweep)
    for point, listed in _combined(sweep):
        trial = _trial(point | listed, lora, train, seed)
        trial.name = "-".join([*([str(point["name"])] if point else []), *_words(trial, listed, exact)])
        _check_trial(trial, strategy or StrategyConfig())
        if trial.name in made:
            repair = "Give each point a name of its own, and each list its values once."
            raise ConfigError(f"{KEY}: two points are called {trial.name}. {repair}")
        made[trial.name] = trial
    found = duplicates_of(list(made.values())) if sweep.find_duplicates else {}
    return Sweep([trial for name, trial in made.items() if name not in found], found)


def duplicates_of(trials: Sequence[TrialConfig]) -> dict[str, str]:
    """Returns for each trial that trains the same as an earlier one the name of that one.

    Two recipes train the same, to the bit, when they differ only in how they write the same thing: the scale
    alpha / r, or alpha / sqrt(r) with rsLoRA, and the order of `target_modules`. Nothing else is a duplicate: see
    docs/decisions/0070-which-trials-are-duplicates.md.
    """
    first: dict[str, str] = {}
    found = {}
    for trial in trials:
        same = first.setdefault(repr(effective_recipe(trial)), trial.name)
        if same != trial.name:
            found[trial.name] = same
    return found


def effective_recipe(trial: TrialConfig) -> dict[str, Any]:
    """Returns what a trial's training depends on, each thing written in one way."""
    lora = identity(trial.lora)
    alpha, rslora = lora.pop("lora_alpha"), lora.pop("use_rslora")
    rank = trial.lora.lora_rank
    lora["scale"] = alpha / math.sqrt(rank) if rslora else alpha / rank
    lora["target_modules"] = sorted(set(trial.lora.target_modules))
    return {"lora": lora, "train": identity(trial.train), "seed": trial.seed}


def swept_values(trial: TrialConfig) -> dict[str, Any]:
    """Returns every value of a trial that a sweep can vary, as plain JSON."""
    return {**identity(trial.lora), **identity(trial.train), "seed": trial.seed}


def check_sweep(sweep: SweepConfig, lora: LoraConfig, train: TrainConfig, seed: int, strategy: StrategyConfig) -> None:
    """Refuses points without a sweep, a sweep of what makes no adapter, and points that can't be.

    Raises:
        ConfigError: naming the key.
    """
    if sweep.name is SweepName.none and (given := _given(sweep)):
        repair = f"Set {KEY}=grid or {KEY}=halving."
        raise ConfigError(f"{KEY}.{given[0]} is set, but {KEY}=none walks through nothing. {repair}")
    if sweep.name is not SweepName.none and train.method is Method.full:
        raise bad_value("train.method", "full", "lora with a sweep", "Set sweep=none, or train.method=lora.")
    if sweep.name is not SweepName.none and _given(sweep):
        trials_of(sweep, lora, train, seed, strategy)


def _given(sweep: SweepConfig) -> list[str]:
    return [name for name in (*FIELDS, "points") if getattr(sweep, name)]


def _combined(sweep: SweepConfig) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the values of each named point (none: one of no values) with each combination of the lists."""
    lists = {name: getattr(sweep, name) for name in FIELDS if getattr(sweep, name)}
    points: list[dict[str, Any]] = [_point(sweep, i) for i in range(len(sweep.points))] or [{}]
    number = len(points) * math.prod(len(values) for values in lists.values())
    if number > MAX_TRIALS:
        raise ConfigError(f"{KEY}: {number:,} trials; at most {MAX_TRIALS:,} are planned. Shorten its lists.")
    for point in points:
        if both := sorted(point.keys() & lists.keys()):
            raise ConfigError(f"{KEY}.{both[0]}: it is in {KEY}.points too. Write it in one of the two.")
        for values in itertools.product(*lists.values()):
            yield point, dict(zip(lists, values, strict=True))


def _point(sweep: SweepConfig, number: int) -> dict[str, Any]:
    values, key = sweep.points[number], f"{KEY}.points[{number}]"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(values.get("name", ""))):
        raise bad_value(f"{key}.name", values.get("name", ""), "a name of letters, digits, '_' and '-'")
    if values["name"] in RESERVED:
        wanted = f"another name than {values['name']}, by which a sweep knows the base's own scores"
        raise bad_value(f"{key}.name", values["name"], wanted, f"Set {key}.name=plain, say.")
    for name in values:
        if name != "name" and name not in FIELDS:
            raise ConfigError(f"{key}.{name}: no sweep varies it. {nearest(str(name), FIELDS)}")
    return dict(values)


def _trial(values: Mapping[str, Any], lora: LoraConfig, train: TrainConfig, seed: int) -> TrialConfig:
    """Puts the values of one point in place of the run's own."""

    def of(group: str) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name != "name" and FIELDS[name][1] == group}

    own_seed = of("").get("seed", seed)
    if not isinstance(own_seed, int) or isinstance(own_seed, bool) or not 0 <= own_seed < 2**31:
        raise bad_value(f"{KEY}.seed", own_seed, "a whole number at least 0 and below 2^31")
    return TrialConfig(lora=_typed(lora, of("lora")), train=_typed(train, of("train")), seed=own_seed)


def _check_trial(trial: TrialConfig, strategy: StrategyConfig) -> None:
    """Refuses values out of bounds, a step that doesn't divide, and what the strategy can't do: as without a sweep."""
    check(trial.lora, KEY)
    try:
        check(trial.train, KEY)
        check_step(trial.train, strategy.world_size)
        check_supported(trial.train, strategy)
    except ConfigError as error:
        raise ConfigError(f"{error} (Trial {trial.name} of the sweep.)") from None


def _typed(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns a copy of a config with these values, each converted to its field's type as on the command line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    made = dataclasses.replace(config)
    for name, value in values.items():
        try:
            told = OmegaConf.merge(OmegaConf.structured(type(config)), {name: value})
            converted = OmegaConf.to_container(told, enum_to_str=False)
        except OmegaConfBaseException:
            kind = FIELDS[name][0]
            wanted = f"one of {', '.join(kind.__members__)}" if issubclass(kind, Enum) else f"a value of {name}'s type"
            raise bad_value(f"{KEY}.{name}", value, wanted) from None
        assert isinstance(converted, dict)
        setattr(made, name, converted[name])
    return made


def _written_exactly(sweep: SweepConfig) -> set[str]:
    """Returns the fields whose listed numbers would read the same in six digits: 1e-4 and 1.00000001e-4, say."""
    lists = {name: set(map(float, getattr(sweep, name))) for name in FIELDS if FIELDS[name][0] is float}
    return {name for name, values in lists.items() if len({f"{value:g}" for value in values}) < len(values)}


def _words(trial: TrialConfig, listed: Mapping[str, Any], exact: set[str]) -> list[str]:
    """Returns the part of a trial's name for each value out of a list: `r8`, `a16`, `lr0.0002`."""
    told = swept_values(trial)
    return [SHORT.get(n, f"{n}_") + (repr(told[n]) if n in exact else _shown(told[n])) for n in listed]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(map(str, value)) or "all"
    return str(value).lower() if isinstance(value, bool) else str(value)
