"""From overrides on the command line to one checked `RunConfig`, or to one clear error."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_dist.config.fields import check
from qlora_dist.config.run import RunConfig
from qlora_dist.errors import ConfigError, QloraDistError, bad_value, nearest
from qlora_dist.launch.schema import conf_folder, register_schema


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
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
            return run_config(compose("config", overrides=[*overrides, *extra]))
    except HydraException as error:
        raise translate(error) from error


def run_config(composed: DictConfig) -> RunConfig:
    """Turns Hydra's composed config into the checked dataclasses.

    Raises:
        ConfigError: for a value that is missing, of the wrong type, or out of range.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise translate(error) from error
    if not isinstance(config, RunConfig):
        raise ConfigError("The composed config is not a run's: conf/config.yaml must begin with run_schema.")
    check(config)
    return config


def translate(error: Exception) -> QloraDistError:
    """Says in one sentence what Hydra or OmegaConf found wrong: key, value, what was wanted, the repair."""
    cause = error
    while isinstance(cause, ConfigCompositionException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    for known in (cause, error):
        if isinstance(known, OverrideParseException):
            repair = "Quote values with spaces, brackets or commas: 'key=\"a b\"'."
            return bad_value("override", known.override, "key=value in Hydra's grammar", repair)
        if isinstance(known, MissingConfigException):
            return _missing_option(known)
    if isinstance(cause, OmegaConfBaseException):
        return _bad_key_or_value(cause, str(error))
    return _bad_override(str(error))


def _missing_option(error: MissingConfigException) -> QloraDistError:
    group, _, option = (error.missing_cfg_file or "?").rpartition("/")
    wanted = f"one of the files in conf/{group}/"
    return bad_value(group or "config", option, wanted, nearest(option, error.options or _options(group)))


def _options(group: str) -> list[str]:
    return [path.stem for path in (conf_folder() / group).glob("*.yaml")]


def _bad_override(message: str) -> QloraDistError:
    found = re.search(r"Could not (?:override|append to|delete from config\. ?) ?'?([^'\s]+)'?", message)
    key = found.group(1).rstrip(".") if found else ""
    if key and key in _groups():
        repair = f"Write +{key}=<name>, one of: {', '.join(_options(key))}."
        return ConfigError(f"{key}: it is not in the defaults list. {repair}")
    if key:
        return ConfigError(f"{key}: there is no such key. {_nearest_key(key)}")
    return ConfigError(message.splitlines()[0])


def _bad_key_or_value(error: OmegaConfBaseException, message: str) -> QloraDistError:
    key = str(error.full_key or "")
    if "not in" in str(error.msg) and "Key" in str(error.msg):
        return ConfigError(f"{key}: there is no such key. {_nearest_key(key)}")
    if "Missing mandatory value" in str(error.msg):
        return ConfigError(f"{key}: a value is needed and none is set. Set {key}=<value>.")
    if not key:
        return _bad_override(message)
    value = re.search(r"[Vv]alue '?(.*?)'?(?: of type|, expected| could not|$)", str(error.msg))
    return bad_value(key, value.group(1) if value else "?", _wanted(key))


def _groups() -> list[str]:
    return [path.name for path in conf_folder().iterdir() if path.is_dir()]


def _nearest_key(key: str) -> str:
    head, _, _ = key.rpartition(".")
    siblings = [name for name in valid_keys() if name.rpartition(".")[0] == _schema_key(head)]
    last = key.rpartition(".")[2]
    return nearest(last, [name.rpartition(".")[2] for name in siblings]) if siblings else nearest(key, valid_keys())


def _schema_key(key: str) -> str:
    """Replaces the name of a domain by `<domain>`: all domains have the same keys."""
    return re.sub(r"^domain\.[^.]+", "domain.<domain>", key)


def _wanted(key: str) -> str:
    kind = dict(_walk(RunConfig)).get(re.sub(r"\[\d+\]", "[]", _schema_key(key)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "another type") if isinstance(kind, type) else "another type"


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
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    inner = arguments[-1] if origin in (dict, list) else hint
    inner_name = {dict: f"{name}.<{name.rpartition('.')[2]}>", list: f"{name}[]"}.get(origin or type, name)
    if origin in (dict, list):
        yield inner_name, inner
    if dataclasses.is_dataclass(inner) and isinstance(inner, type):
        yield from _walk(inner, inner_name)
