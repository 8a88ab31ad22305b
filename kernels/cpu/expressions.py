"""A spec's expressions as C++: what is done to the scores of one query row, key by key.

Arithmetic follows C++'s own types: positions are `int`, loads are what the tensor holds, scores are
`float`. What does not depend on the key stands before the loop over the keys; the loop's body has
no branches, so that compilers make vectors of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.core.relational import Relational

from adaattn_compiler.spec import Load, M, N, Where, k, param

# Element types by the name that a torch dtype has without "torch.".
ELEMENTS = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "Bfloat16",
    "float16": "Float16",
    "bool": "uint8_t",
    "int64": "int64_t",
    "int32": "int32_t",
}

_LARGEST_FLOAT = 3.4028234663852886e38


class NoCpp(Exception):
    """What has no form here, with the reason."""


@dataclass
class Row:
    """The C++ of one row's expressions: statements before the loop, and the loads they name."""

    elements: Sequence[str]
    names: dict[str, str] = field(default_factory=dict)  # by what they stand for

    @property
    def statements(self) -> list[str]:
        """What stands before the loop."""
        return [f"const auto {name} = {text};" for text, name in self.names.items()]

    def printed(self, expression: Any, *, lazily: bool = False) -> str:
        """An expression; lazily: where it may only be evaluated under a condition."""
        if expression in (sympy.true, sympy.false):
            return "true" if expression == sympy.true else "false"
        if expression.is_Symbol:
            return str(expression)
        if expression.is_number:
            return number(expression)
        if isinstance(expression, Load):
            return self._load(expression, lazily)
        if isinstance(expression, Where):
            condition, x, y = (self.printed(arg, lazily=True) for arg in expression.args)
            return f"({condition} ? {x} : {y})"
        parts = [self.printed(arg, lazily=lazily) for arg in _ordered(expression)]
        if isinstance(expression, Relational):
            return f"({parts[0]} {_RELATIONS[type(expression)]} {parts[1]})"
        if isinstance(expression, sympy.floor):
            return self._floor(expression.args[0], lazily)
        if isinstance(expression, sympy.Pow):
            return _power(expression, parts[0])
        if isinstance(expression, sympy.Mul) and expression.is_integer:
            parts[0] = f"int64_t({parts[0]})"  # may pass 32 bits
        form = _FORMS.get(expression.func)
        if form is None:
            raise NoCpp(f"no C++ of {expression.func.__name__}")
        return form(parts)

    def _floor(self, inside: Any, lazily: bool) -> str:
        top, bottom = inside.as_numer_denom()
        if top.is_integer and bottom.is_integer:
            numerator, denominator = (self.printed(e, lazily=lazily) for e in (top, bottom))
            return f"floor_divide({numerator}, {denominator})"
        return f"std::floor({self.printed(inside, lazily=lazily)})"

    def _load(self, load: Load, lazily: bool) -> str:
        operand, index = int(load.args[0]), load.args[1:]
        by_key = [place for place in index if place.has(k)]
        if lazily or by_key not in ([], list(index[-1:])):
            text = f"{self._pointer(operand, index, lazily)}[0]"
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
        return self.names.setdefault(
            text, f"operand{operand}_{'abcdefghijklmnop'[len(self.names)]}"
        )

    def _element(self, operand: int, text: str) -> str:
        """An element as something that C++ computes with."""
        element = self.elements[operand]
        if element == "uint8_t":
            return f"int({text} != 0)"
        return f"to_float({text})" if element in ("Bfloat16", "Float16", "double") else text

    def _pointer(self, operand: int, index: Sequence[Any], lazily: bool = False) -> str:
        """Where an operand's element is; the last stride is 1."""
        text = f"elements_of<{self.elements[operand]}>(call, {operand})"
        for axis, place in enumerate(index):
            if place != 0:
                text += (
                    f" + int64_t({self.printed(place, lazily=lazily)}) * "
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
    return found + [f"const int p{i} = int(call.params[{i}]);" for i in numbers]


def number(value: Any) -> str:
    """A number as C++ writes it. NoCpp for one that a float cannot hold."""
    if value.is_Integer:
        if abs(int(value)) < 1 << 31:
            return f"({int(value)})" if value < 0 else str(int(value))
        return number(sympy.Float(float(value)))
    if value == sympy.oo or value == -sympy.oo:
        return "kInfinity" if value == sympy.oo else "-kInfinity"
    real = float(value)
    if not abs(real) <= _LARGEST_FLOAT:
        raise NoCpp(f"{real} is beyond float32")
    text = f"{real!r}f"
    return f"({text})" if real < 0 else text


def _ordered(expression: Any) -> Sequence[Any]:
    """Arguments in an order that is the same in every process."""
    commutes = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.And, sympy.Or)
    if not isinstance(expression, commutes):
        return tuple(expression.args)
    # Whole numbers first: their sums and products are exact.
    return sorted(expression.args, key=lambda arg: (not arg.is_integer, str(arg)))


def _power(expression: Any, base: str) -> str:
    exponent = expression.exp
    if exponent == -1:
        return f"(1.0f / {base})"
    if exponent.is_Integer and 1 < exponent <= 4:
        return "(" + " * ".join([base] * int(exponent)) + ")"
    raise NoCpp(f"no C++ of {expression}")


def _joined(sign: str) -> Callable[[list[str]], str]:
    return lambda parts: "(" + f" {sign} ".join(parts) + ")"


def _nested(function: str) -> Callable[[list[str]], str]:
    def form(parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else f"{function}({parts[0]}, {form(parts[1:])})"

    return form


_FORMS: dict[Any, Callable[[list[str]], str]] = {
    sympy.Add: _joined("+"),
    sympy.Mul: _joined("*"),
    sympy.And: _joined("&"),
    sympy.Or: _joined("|"),
    sympy.Not: lambda parts: f"!{parts[0]}",
    sympy.Abs: lambda parts: f"magnitude({parts[0]})",
    sympy.Mod: lambda parts: f"modulo({parts[0]}, {parts[1]})",
    sympy.Max: _nested("maximum"),
    sympy.Min: _nested("minimum"),
    sympy.tanh: lambda parts: f"tanh_of({parts[0]})",
}

_RELATIONS = {
    sympy.Ge: ">=",
    sympy.Gt: ">",
    sympy.Le: "<=",
    sympy.Lt: "<",
    sympy.Eq: "==",
    sympy.Ne: "!=",
}
