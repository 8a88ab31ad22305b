"""As much of JSON Schema (2020-12) as the policy's needs, so that no dependency does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON value is valid; KeyError for a keyword that is not implemented here."""
    ignored = ("$schema", "$id", "title", "description", "additionalProperties")
    names = (name for name in schema if name not in ignored)
    return _extra(value, schema) and all(_KEYWORDS[n](value, schema[n]) for n in names)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _type(value: Any, name: str) -> bool:
    if name == "number":
        return _number(value) and (isinstance(value, int) or math.isfinite(value))
    if name == "integer":
        return _number(value) and (isinstance(value, int) or value.is_integer())
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool}
    return isinstance(value, kinds[name])


def _extra(value: Any, schema: dict[str, Any]) -> bool:
    allowed = schema.get("additionalProperties", True)
    if not isinstance(value, dict) or allowed is True:
        return True
    rest = [name for name in value if name not in schema.get("properties", {})]
    return not rest if allowed is False else all(is_valid(value[name], allowed) for name in rest)


def _properties(value: Any, fields: dict[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    return all(is_valid(value[name], fields[name]) for name in fields if name in value)


def _matches(text: str, pattern: str) -> bool:
    """ECMA's `$` is the very end; Python's is also before a line feed there."""
    return re.search(re.sub(r"\$$", r"\\Z", pattern), text) is not None


def _one_of(value: Any, choices: list[Any]) -> bool:
    return not isinstance(value, bool) and value in choices


_KEYWORDS: dict[str, Callable[[Any, Any], bool]] = {
    "type": _type,
    "properties": _properties,
    "enum": _one_of,
    "required": lambda v, names: not isinstance(v, dict) or all(name in v for name in names),
    "propertyNames": lambda v, s: not isinstance(v, dict) or all(is_valid(n, s) for n in v),
    "items": lambda v, schema: not isinstance(v, list) or all(is_valid(x, schema) for x in v),
    "minItems": lambda v, least: not isinstance(v, list) or len(v) >= least,
    "maxItems": lambda v, most: not isinstance(v, list) or len(v) <= most,
    "minimum": lambda v, least: not _number(v) or v >= least,
    "maximum": lambda v, most: not _number(v) or v <= most,
    "exclusiveMinimum": lambda v, bound: not _number(v) or v > bound,
    "pattern": lambda v, pattern: not isinstance(v, str) or _matches(v, pattern),
    "allOf": lambda v, schemas: all(is_valid(v, schema) for schema in schemas),
    "not": lambda v, schema: not is_valid(v, schema),
}
