"""The form that a domain's answers have, as a JSON schema that is inferred from its references by one rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


def infer_schema(values: Sequence[Any]) -> dict[str, Any]:
    """Returns the narrowest schema of this rule that all `values` meet.

    Types are those seen; an object's keys are required when each object has them, and no other key is allowed; the
    items of all arrays share one schema. Values are not narrowed to those seen.
    """
    names = sorted({"null" if v is None else TYPES[type(v)] for v in values})
    schema: dict[str, Any] = {"type": names[0] if len(names) == 1 else names}
    objects = [v for v in values if isinstance(v, dict)]
    if objects:
        keys = dict.fromkeys(k for o in objects for k in o)
        schema["properties"] = {k: infer_schema([o[k] for o in objects if k in o]) for k in keys}
        schema["required"] = [k for k in keys if all(k in o for o in objects)]
        schema["additionalProperties"] = False
    items = [item for v in values if isinstance(v, list) for item in v]
    if items:
        schema["items"] = infer_schema(items)
    return schema


def schema_of_references(references: Sequence[str]) -> dict[str, Any] | None:
    """Returns the schema of a domain whose references are all JSON objects or arrays, else None."""
    try:
        values = [json.loads(r) for r in references]
    except ValueError:
        return None
    if not values or not all(isinstance(v, (dict, list)) for v in values):
        return None
    return infer_schema(values)


def schema_failure(value: Any, schema: dict[str, Any]) -> str:
    """Returns "" if a value meets the schema, else the first failure's kind and place (needs `jsonschema`)."""
    from jsonschema import Draft202012Validator

    error = min(Draft202012Validator(schema).iter_errors(value), key=lambda e: list(map(str, e.path)), default=None)
    kinds = {"required": "missing key", "additionalProperties": "unknown key", "type": "wrong type"}
    return "" if error is None else kinds.get(str(error.validator), str(error.validator))
