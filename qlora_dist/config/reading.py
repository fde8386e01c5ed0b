"""Which keys of a config were read: one that was set and that nothing read was dropped in silence."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")


def watched(config: T) -> T:
    """Returns a copy of a tree of config dataclasses that notes which of its fields are read, here and below.

    The copy is of the same classes to `isinstance`, and compares with other copies alone.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    values = {f.name: watched(getattr(config, f.name)) for f in dataclasses.fields(config)}
    copy: T = _watching(type(config))(**values)
    return copy


def unread(config: Any, *, execution: bool = False, key: str = "") -> list[str]:
    """Returns the keys of a watched config that were set away from their default and that nothing has read.

    Args:
        config: what `watched` returned.
        execution: asks for the fields that say how or where instead of those that say what is made; all that lies
            under such a field is of its kind.
        key: goes before each name.
    """
    found = []
    for field in dataclasses.fields(config):
        value, name = object.__getattribute__(config, field.name), f"{key}.{field.name}" if key else field.name
        is_execution = bool(field.metadata.get("execution"))
        if dataclasses.is_dataclass(value):
            own = [execution] if not is_execution else [False, True] if execution else []
            found += [k for kind in own for k in unread(value, execution=kind, key=name)]
        elif is_execution is execution and value != _default(field):
            found += [name] if field.name not in object.__getattribute__(config, "_read") else []
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@lru_cache
def _watching(kind: type) -> type:
    """Makes the subclass of a config class that notes what is read of it."""
    names = frozenset(field.name for field in dataclasses.fields(kind))

    def begin(self: Any, **values: Any) -> None:
        object.__setattr__(self, "_read", set())
        kind.__init__(self, **values)  # type: ignore[misc]

    def read(self: Any, name: str) -> Any:
        if name in names:
            object.__getattribute__(self, "_read").add(name)
        return object.__getattribute__(self, name)

    body = {"__slots__": ("_read",), "__init__": begin, "__getattribute__": read, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)
