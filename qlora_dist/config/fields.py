"""What a config field can say of itself: its bounds, and whether it is identity or execution.

*Identity* fields say what is made and enter an artifact's key. *Execution* fields say how and where
(launcher, world size, micro-batch, paths) and stay out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from typing import Any

from qlora_dist.errors import bad_value


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    execution: bool = False,
) -> Any:
    """Declares a config field with inclusive (`at_least`, `at_most`) or strict (`above`, `below`) bounds.

    `default` is a value, or a class (`list`, `dict`, a config dataclass) that is called for a fresh one.
    """
    metadata = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "execution": execution}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def execution(default: Any, **bounds: float) -> Any:
    """Declares a field that says how or where, and so stays out of every key."""
    return setting(default, execution=True, **bounds)


def identity(config: Any) -> Any:
    """Returns the part of a config that names what is made, as plain JSON values (execution fields left out)."""
    if dataclasses.is_dataclass(config):
        kept = (f for f in dataclasses.fields(config) if not f.metadata.get("execution"))
        return {f.name: identity(getattr(config, f.name)) for f in kept}
    return plain(config, identity)


def everything(config: Any) -> Any:
    """Returns a whole config as plain JSON values, execution fields included."""
    if dataclasses.is_dataclass(config):
        return {f.name: everything(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return plain(config, everything)


def plain(value: Any, inner: Any) -> Any:
    """Turns enums into names and containers into lists and dicts, each element through `inner`."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(v) for v in value]
    return value


def check(config: Any, key: str = "") -> None:
    """Checks every bound in a tree of config dataclasses, then each one's own `check(key)` if it has one.

    Raises:
        ConfigError: at the first value out of bounds, with its full key.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{key}.{field.name}" if key else field.name
        for part, part_name in _parts(value, name):
            if dataclasses.is_dataclass(part):
                check(part, part_name)
            elif isinstance(part, (int, float)) and not isinstance(part, bool):
                _check_bounds(part, part_name, field.metadata)
    own = getattr(config, "check", None)
    if own is not None:
        own(key)


def _parts(value: Any, name: str) -> Iterator[tuple[Any, str]]:
    if isinstance(value, dict):
        yield from ((v, f"{name}.{k}") for k, v in value.items())
    elif isinstance(value, list):
        yield from ((v, f"{name}[{i}]") for i, v in enumerate(value))
    else:
        yield value, name


def _check_bounds(value: float, key: str, bounds: Any) -> None:
    tests = (
        ("at_least", "at least", lambda limit: value >= limit),
        ("above", "above", lambda limit: value > limit),
        ("at_most", "at most", lambda limit: value <= limit),
        ("below", "below", lambda limit: value < limit),
    )
    wanted = [f"{words} {bounds[k]:g}" for k, words, _ in tests if bounds.get(k) is not None]
    if any(bounds.get(k) is not None and not holds(bounds[k]) for k, _, holds in tests):  # NaN fails each of these
        raise bad_value(key, value, f"a number {' and '.join(wanted)}")
