"""Forms of lists and objects, made of other forms."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaattn_compiler.policy.error import Path, PolicyError, shown
from adaattn_compiler.policy.forms import Form, Text


class Repeated(dict[str, Any]):
    """A JSON object in which a name is given more than once; the first such name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


@dataclass(frozen=True)
class ListOf(Form):
    """A list whose members are of one form, from `shortest` to `longest` of them."""

    member: Form
    valid: str
    shortest: int = 0
    longest: int | None = None

    def check(self, value: Any, path: Path) -> None:
        if not isinstance(value, list):
            raise PolicyError(path, f"is {shown(value)}; it must be {self.valid}")
        if len(value) < self.shortest or (self.longest is not None and len(value) > self.longest):
            raise PolicyError(path, f"has length {len(value)}; it must be {self.valid}")
        for index, member in enumerate(value):
            self.member.check(member, (*path, index))

    def build(self, value: Any, path: Path) -> tuple[Any, ...]:
        return tuple(self.member.build(each, (*path, index)) for index, each in enumerate(value))

    def write(self, value: Any) -> list[Any]:
        return [self.member.write(each) for each in value]

    def schema(self) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "array", "items": self.member.schema()}
        if self.shortest:
            found["minItems"] = self.shortest
        if self.longest is not None:
            found["maxItems"] = self.longest
        return found


@dataclass(frozen=True)
class MapOf(Form):
    """An object with names of the file's own choosing; `required` are always there."""

    name: Text
    member: Form
    required: tuple[str, ...] = ()

    def check(self, value: Any, path: Path) -> None:
        _check_object(value, path)
        _check_present(value, self.required, path)
        for name, member in value.items():
            if re.fullmatch(self.name.pattern, name) is None:
                raise PolicyError((*path, name), f"is named so; names must be {self.name.valid}")
            self.member.check(member, (*path, name))

    def build(self, value: Any, path: Path) -> dict[str, Any]:
        return {name: self.member.build(each, (*path, name)) for name, each in value.items()}

    def write(self, value: Any) -> dict[str, Any]:
        return {name: self.member.write(value[name]) for name in sorted(value)}

    def schema(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": "object",
            "propertyNames": self.name.schema(),
            "additionalProperties": self.member.schema(),
        }
        return found | ({"required": list(self.required)} if self.required else {})


@dataclass(frozen=True)
class Field:
    """A field of a record: its form and what it means. An optional one is left out for None."""

    form: Form
    means: str
    optional: bool = False


@dataclass(frozen=True)
class Record(Form):
    """An object with named fields, and the value made of them.

    make: called with the fields by name (None for one that is left out).
    parts: the fields of a value; by default its attributes of those names.
    exclusive: optional fields of which at most one may be given.
    """

    make: Callable[..., Any]
    fields: Mapping[str, Field]
    parts: Callable[[Any], Mapping[str, Any]] | None = None
    exclusive: tuple[str, ...] = ()

    def check(self, value: Any, path: Path) -> None:
        _check_object(value, path)
        for name in value:
            if name not in self.fields:
                raise PolicyError((*path, name), _unknown(name, self.fields))
        required = [name for name, field in self.fields.items() if not field.optional]
        _check_present(value, required, path)
        given = [name for name in self.exclusive if name in value]
        if len(given) > 1:
            reason = (
                f"is given beside {given[0]}; at most one may be of {', '.join(self.exclusive)}"
            )
            raise PolicyError((*path, given[1]), reason)
        for name, member in value.items():
            self.fields[name].form.check(member, (*path, name))

    def build(self, value: Any, path: Path) -> Any:
        found = {
            name: field.form.build(value[name], (*path, name)) if name in value else None
            for name, field in self.fields.items()
        }
        return _made(lambda: self.make(**found), path)

    def write(self, value: Any) -> dict[str, Any]:
        if self.parts is None:
            parts = {name: getattr(value, name) for name in self.fields}
        else:
            parts = dict(self.parts(value))
        return {
            name: field.form.write(parts[name])
            for name, field in self.fields.items()
            if not (field.optional and parts[name] is None)
        }

    def schema(self) -> dict[str, Any]:
        fields = self.fields.items()
        found: dict[str, Any] = {
            "type": "object",
            "properties": {name: {"description": f.means, **f.form.schema()} for name, f in fields},
            "required": [name for name, field in fields if not field.optional],
            "additionalProperties": False,
        }
        pairs = [(a, b) for a in self.exclusive for b in self.exclusive if a < b]
        return found | ({"allOf": [{"not": {"required": [*p]}} for p in pairs]} if pairs else {})


@dataclass(frozen=True)
class Made(Form):
    """Another form, and a value made of what it holds."""

    form: Form
    make: Callable[[Any], Any]
    parts: Callable[[Any], Any]

    def check(self, value: Any, path: Path) -> None:
        self.form.check(value, path)

    def build(self, value: Any, path: Path) -> Any:
        held = self.form.build(value, path)
        return _made(lambda: self.make(held), path)

    def write(self, value: Any) -> Any:
        return self.form.write(self.parts(value))

    def schema(self) -> dict[str, Any]:
        return self.form.schema()


def _made(make: Callable[[], Any], path: Path) -> Any:
    """A value, or why there is no such value, as a PolicyError at the path."""
    try:
        return make()
    except PolicyError as error:
        raise error.under(path) from None
    except ValueError as error:
        raise PolicyError(path, f"is refused: {error}") from None


def _check_object(value: Any, path: Path) -> None:
    if isinstance(value, Repeated):
        raise PolicyError((*path, value.name), "is given more than once; it must be given once")
    if not isinstance(value, dict):
        raise PolicyError(path, f"is {shown(value)}; it must be an object, {{...}}")


def _check_present(value: dict[str, Any], required: Iterable[str], path: Path) -> None:
    for name in required:
        if name not in value:
            raise PolicyError((*path, name), "is missing; it must be given")


def _unknown(name: str, fields: Mapping[str, Field]) -> str:
    near = difflib.get_close_matches(name, list(fields), n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    return f"is not a known field{suggestion}; known are {', '.join(fields)}"
