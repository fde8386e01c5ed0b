"""From overrides on the command line to one checked `RunConfig`, or to one clear error."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_dist.config import sweep
from qlora_dist.config.fields import check
from qlora_dist.config.run import RunConfig
from qlora_dist.config.train import LoraConfig, TrainConfig
from qlora_dist.errors import ConfigError, QloraDistError, bad_value, nearest
from qlora_dist.launch.conf import conf_folder
from qlora_dist.launch.schema import register_schema

LISTS = {
    f"{sweep.KEY}.target_modules": "a list of lists, as [[q_proj],[q_proj,v_proj]]",
    f"{sweep.KEY}.points": "a list of named points, as [{name: small, lora_rank: 4}]",
}
"""What is wanted where a list holds lists or mappings."""


def compose_run(overrides: Sequence[str], config_dir: str | None = None) -> RunConfig:
    """Composes and checks the config that these overrides mean.

    Args:
        overrides: in Hydra's grammar: `+experiment=legal`, `train.learning_rate=1e-4`, `domain=[legal,code]`.
        config_dir: a folder of config files of the user's own, searched first.

    Raises:
        ConfigError: for an unknown key, group or option, a wrong type, or a value out of range.
    """
    register_schema()
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    values = _parse(overrides)
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
            return run_config(compose("config", overrides=[*overrides, *extra]))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise translate(error, values) from error


def run_config(composed: DictConfig) -> RunConfig:
    """Turns Hydra's composed config into the checked dataclasses.

    Raises:
        ConfigError: for a value that is missing, of the wrong type, or out of range.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise translate(error, {}) from error
    if not isinstance(config, RunConfig):
        raise ConfigError("The composed config is not a run's: conf/config.yaml must begin with run_schema.")
    check(config)
    return config


def _parse(overrides: Sequence[str]) -> dict[str, str]:
    """Returns each override's value as typed, by its key.

    Raises:
        ConfigError: for broken grammar, or a key that no run has.
    """
    values = {}
    for line in overrides:
        override = parse_override(line)
        key = override.key_or_group
        values[key] = line.partition("=")[2]
        if key.partition(".")[0] != "hydra" and key not in _groups() and not _is_valid(key):
            raise _no_such_key(key)
    return values


def parse_override(line: str) -> Override:
    """Returns one override as Hydra reads it.

    Raises:
        ConfigError: for broken grammar.
    """
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        repair = "Quote values with spaces, brackets or commas: 'key=\"a b\"'."
        raise bad_value("override", line, "key=value in Hydra's grammar", repair) from error


def _is_valid(key: str) -> bool:
    return any(re.fullmatch(re.sub(r"<\w+>", "[^.]+", re.escape(valid)), key) for valid in valid_keys())


def translate(error: Exception, values: Mapping[str, str]) -> QloraDistError:
    """Says in one sentence what Hydra or OmegaConf found wrong: key, value, what was wanted, the repair."""
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "?").rpartition("/")
        wanted = f"one of the files in conf/{group}/"
        return bad_value(group or "config", option, wanted, nearest(option, error.options or _options(group)))
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    merged = re.match(r"Error merging override [+~]*([\w.]+)=", str(error))
    if merged and isinstance(cause, OmegaConfBaseException) and str(cause.full_key).isdigit():
        key = merged.group(1)  # of lists in a list, and of mappings in one, OmegaConf names the place alone
        return bad_value(key, values.get(key, ""), _wanted(key))
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return _bad_key_or_value(cause, values)
    absent = re.search(r"Could not override '(\w+)'\. No match in the defaults list", str(error))
    if absent:
        group = absent.group(1)
        repair = f"Write +{group}=<name>, one of: {', '.join(_options(group))}."
        return ConfigError(f"{group}: it is not in the defaults list. {repair}")
    return ConfigError(str(error).splitlines()[0])


def _bad_key_or_value(error: OmegaConfBaseException, values: Mapping[str, str]) -> QloraDistError:
    key, message = str(error.full_key), str(error.msg)
    if re.match(r"Key '.*' not in", message):
        return _no_such_key(key)
    if "Missing mandatory value" in message:
        return ConfigError(f"{key}: a value is needed and none is set. Set {key}=<value>.")
    quoted = re.search(r"[Vv]alue '(.*?)'", message)
    value = values.get(key) or (quoted.group(1) if quoted else "")
    wanted = _wanted(key)
    quotes = "YAML reads on and off as true and false: write 'on' or 'off', with quotes."
    return bad_value(key, value, wanted, quotes if value.lower() in ("true", "false") and "off" in wanted else "")


def _options(group: str) -> list[str]:
    return [path.stem for path in (conf_folder() / group).glob("*.yaml")]


def _groups() -> list[str]:
    return [path.name for path in conf_folder().iterdir() if path.is_dir()]


def _no_such_key(key: str) -> ConfigError:
    """Says that no run has this key, and which is near; of a field that no sweep varies, where it is set."""
    head, _, last = key.rpartition(".")
    for group, config in (("lora", LoraConfig), ("train", TrainConfig)):
        fields = {field.name: field.metadata for field in dataclasses.fields(config)}
        if head == sweep.KEY and last in fields.keys() - sweep.FIELDS.keys():
            how = " It says how a trial is trained, not what is made." if fields[last].get("execution") else ""
            repair = f"Set {group}.{last}=<value> for all trials; a sweep varies {', '.join(sweep.FIELDS)}."
            return ConfigError(f"{key}: no sweep varies {group}.{last}.{how} {repair}")
    names = [name for name in valid_keys() if not name.endswith("[]")]
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == _schema_key(head)]
    near = nearest(last, siblings) if siblings else nearest(key, names)
    return ConfigError(f"{key}: there is no such key. {near}")


def _schema_key(key: str) -> str:
    """Replaces the name of a domain by `<domain>`: all domains have the same keys."""
    return re.sub(r"^domain\.[^.]+", "domain.<domain>", key)


def _wanted(key: str) -> str:
    if key in LISTS:
        return LISTS[key]
    kind: Any = dict(_walk(RunConfig)).get(re.sub(r"\[\d+\]", "[]", _schema_key(key)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "a list" if typing.get_origin(kind) is list else "another type")


def valid_keys() -> list[str]:
    """Returns every key a run's config has, `domain.<domain>.…` standing for each domain's."""
    return [key for key, _ in _walk(RunConfig)]


def _walk(kind: type, key: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{key}.{field.name}" if key else field.name
        yield from _walk_field(hints[field.name], name)


def _walk_field(hint: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, hint
    inner, inner_name = hint, name
    origin = typing.get_origin(hint)
    if origin in (dict, list):
        inner = typing.get_args(hint)[-1]
        inner_name = f"{name}[]" if origin is list else f"{name}.<{name.rpartition('.')[2]}>"
        yield inner_name, inner
    if dataclasses.is_dataclass(inner) and isinstance(inner, type):
        yield from _walk(inner, inner_name)
