"""A spec's expressions as C++: what is done to the scores of one query row, key by key.

Loads are what the tensor holds, scores are `float`. What does not depend on the key stands before
the loop over the keys; the loop's body has no branches, so that compilers make vectors of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy

from adaattn_compiler.kernels.printing import SHARED_FORMS, Form, NoCode, Printer
from adaattn_compiler.spec import Load, M, N, Where, k, param


class _Elements(dict[str, str]):
    def __missing__(self, dtype: str) -> str:
        raise NoCode(f"no C++ type for torch.{dtype}")


# Element types by the name that a torch dtype has without "torch.". NoCode for any other.
ELEMENTS = _Elements(
    {
        "float32": "float",
        "float64": "double",
        "bfloat16": "Bfloat16",
        "float16": "Float16",
        "bool": "bool",
        "int64": "int64_t",
        "int32": "int32_t",
        "int16": "int16_t",
        "int8": "int8_t",
        "uint8": "uint8_t",
    }
)
_WHOLE = ("bool", "int64_t", "int32_t", "int16_t", "int8_t", "uint8_t")

# That there is a condition is all that this language has to know of it.
GUARDED = "guarded"
# Axes of an operand (call.h).
_MOST_AXES = 4


@dataclass
class Row(Printer):
    """The C++ of one row's expressions: statements before the loop, and the loads they name."""

    elements: Sequence[str]
    names: dict[str, str] = field(default_factory=dict)  # by what they stand for

    language: ClassVar[str] = "C++"
    forms: ClassVar[Mapping[Any, Form]] = {
        **SHARED_FORMS,
        sympy.Not: lambda parts: f"!{parts[0]}",
        sympy.Abs: lambda parts: f"magnitude({parts[0]})",
        sympy.tanh: lambda parts: f"tanh_of({parts[0]})",
    }

    @property
    def statements(self) -> list[str]:
        """What stands before the loop."""
        return [f"const auto {name} = {text};" for text, name in self.names.items()]

    def truth(self, value: bool) -> str:
        return "true" if value else "false"

    def real(self, value: float) -> str:
        return "kInfinity" if value == float("inf") else f"{value!r}f"

    def integer(self, value: int) -> str:
        return str(value) if value < 1 << 30 else f"int64_t({value}LL)"

    def wide(self, text: str) -> str:
        return f"int64_t({text})"

    def quotient(self, numerator: str, denominator: str, whole: bool) -> str:
        if whole:
            return f"floor_divide({numerator}, {denominator})"
        return f"floor_of(float({numerator}) / float({denominator}))"

    def reciprocal(self, text: str) -> str:
        return f"(1.0f / {text})"

    def choice(self, where: Where, guard: str | None) -> str:
        condition, x, y = (self.printed(arg, GUARDED) for arg in where.args)
        return f"({condition} ? {x} : {y})"

    def is_whole_operand(self, operand: int) -> bool:
        return self.elements[operand] in _WHOLE

    def load(self, load: Load, guard: str | None) -> str:
        operand, index = int(load.args[0]), load.args[1:]
        by_key = [place for place in index if place.has(k)]
        if guard or by_key not in ([], list(index[-1:])):
            text = f"{self._pointer(operand, index, guard)}[0]"
        elif not by_key:
            return self._named(
                operand, self._element(operand, f"{self._pointer(operand, index)}[0]")
            )
        else:
            row = self._named(operand, self._pointer(operand, index[:-1]))
            text = f"{row}[{self.printed(index[-1])}]"
        return self._element(operand, text)

    def _named(self, operand: int, text: str) -> str:
        """The name of what stands before the loop, made where it is not there yet."""
        return self.names.setdefault(text, f"operand{operand}_{len(self.names)}")

    def _element(self, operand: int, text: str) -> str:
        """An element as something that C++ computes with."""
        element = self.elements[operand]
        if element == "bool":
            return f"int({text} != 0)"
        if element == "int32_t":  # a sum may pass 32 bits
            return f"int64_t({text})"
        return f"to_float({text})" if element in ("Bfloat16", "Float16", "double") else text

    def _pointer(self, operand: int, index: Sequence[Any], guard: str | None = None) -> str:
        """Where an operand's element is; the last stride is 1."""
        if len(index) > _MOST_AXES:
            raise NoCode(f"an operand of more than {_MOST_AXES} axes")
        element = self.elements[operand]
        stored = "uint8_t" if element == "bool" else element
        text = f"elements_of<{stored}>(call, {operand})"
        for axis, place in enumerate(index):
            if place != 0:
                text += (
                    f" + int64_t({self.printed(place, guard)}) * "
                    f"call.operands[{operand}].stride[{axis}]"
                )
        return f"({text})"


def sizes_of(number_of_params: int, *expressions: Any) -> list[str]:
    """The declarations of the sizes, and of the run-time numbers (so many), that are mentioned."""
    mentioned = {s for e in expressions if e is not None for s in e.free_symbols}
    found = []
    for symbol, text in ((M, "call.rows"), (N, "call.columns")):
        if symbol in mentioned:
            found.append(f"const int {symbol} = int({text});")
    numbers = (i for i in range(number_of_params) if param(i) in mentioned)
    return found + [f"const int64_t p{i} = call.params[{i}];" for i in numbers]
