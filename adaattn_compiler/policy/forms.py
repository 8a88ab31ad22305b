"""Forms: how a value stands in a JSON file. Each form checks, builds, writes and describes itself.

One description of each field serves the reader, the writer and the published JSON Schema, so that
they cannot drift apart. `check` refuses exactly what `schema` refuses, naming the field; what a
schema cannot say (that two lists are of one length, say) the values themselves refuse when `build`
makes them.
"""

from __future__ import annotations

import abc
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaattn_compiler.policy.error import Path, PolicyError, shown

# Beyond any number that is measured, and safe to compute with as a float64.
LARGEST = 1e300


class Form(abc.ABC):
    """How values of one kind stand in JSON."""

    @abc.abstractmethod
    def check(self, value: Any, path: Path) -> None:
        """PolicyError where a JSON value is not of this form."""

    def build(self, value: Any, path: Path) -> Any:
        """The value that a JSON value of this form stands for."""
        return value

    def write(self, value: Any) -> Any:
        """The JSON value that stands for it."""
        return value

    @abc.abstractmethod
    def schema(self) -> dict[str, Any]:
        """The same as a JSON Schema."""


@dataclass(frozen=True)
class Text(Form):
    """A string that matches a pattern; `valid` says in words which."""

    pattern: str
    valid: str

    def check(self, value: Any, path: Path) -> None:
        if not isinstance(value, str) or re.fullmatch(self.pattern, value) is None:
            raise PolicyError(path, f"is {shown(value)}; it must be {self.valid}")

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^(?:{self.pattern})$"}


@dataclass(frozen=True)
class Switch(Form):
    def check(self, value: Any, path: Path) -> None:
        if not isinstance(value, bool):
            raise PolicyError(path, f"is {shown(value)}; it must be true or false")

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Integer(Form):
    """An integer; 64.0 counts as one, as it does in JSON Schema."""

    minimum: int
    maximum: int
    unit: str = "an integer"

    def check(self, value: Any, path: Path) -> None:
        whole = _is_number(value) and (isinstance(value, int) or value.is_integer())
        if not whole or not self.minimum <= value <= self.maximum:
            valid = f"{self.unit} from {self.minimum} to {self.maximum}"
            raise PolicyError(path, f"is {shown(value)}; it must be {valid}")

    def build(self, value: Any, path: Path) -> int:
        return int(value)

    def write(self, value: Any) -> Any:
        """An int where it is one (numpy's, too); anything else as it is, for `check` to refuse."""
        return int(value) if _is(value, numbers.Integral) else value

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}


@dataclass(frozen=True)
class Number(Form):
    """A finite number; `above` is a bound that it does not reach."""

    valid: str
    minimum: float = -LARGEST
    maximum: float = LARGEST
    above: float | None = None

    def check(self, value: Any, path: Path) -> None:
        holds = _is_number(value) and self.minimum <= value <= self.maximum
        if not holds or (self.above is not None and not value > self.above):
            raise PolicyError(path, f"is {shown(value)}; it must be {self.valid}")

    def build(self, value: Any, path: Path) -> float:
        return float(value)

    def write(self, value: Any) -> Any:
        """A float where it is in range; anything else as it is, for `check` to refuse."""
        return float(value) if _is(value, numbers.Real) and abs(value) <= LARGEST else value

    def schema(self) -> dict[str, Any]:
        low = {"minimum": self.minimum} if self.above is None else {"exclusiveMinimum": self.above}
        return {"type": "number", **low, "maximum": self.maximum}


@dataclass(frozen=True)
class OneOf(Form):
    """A choice: what stands in the file, and the value that it stands for."""

    choices: Mapping[str | int, Any]

    def check(self, value: Any, path: Path) -> None:
        if isinstance(value, bool) or not any(value == choice for choice in self.choices):
            known = ", ".join(shown(choice) for choice in self.choices)
            one = "it must be" if len(self.choices) == 1 else "it must be one of"
            raise PolicyError(path, f"is {shown(value)}; {one} {known}")

    def build(self, value: Any, path: Path) -> Any:
        return self.choices[value]

    def write(self, value: Any) -> Any:
        for written, meant in self.choices.items():
            if meant == value:
                return written
        return value  # which `check` refuses

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.choices)}


def _is(value: Any, kind: type) -> bool:
    """Whether it is of a kind of numbers; True and False are of none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether it is a number that JSON has, which NaN and Infinity are not."""
    return _is(value, int) or (_is(value, float) and math.isfinite(value))
