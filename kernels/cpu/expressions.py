"""A spec's expressions as C++: what is done to the scores of one query row, key by key.

Arithmetic follows C++'s own types: positions are `int` (below 2^30, so that a sum of two is one),
products of whole numbers and whatever else may pass 32 bits `int64_t`, loads are what the tensor
holds, scores are `float`. What does not depend on the key stands before the loop over the keys; the
loop's body has no branches, so that compilers make vectors of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.core.relational import Relational

from adaattn_compiler.spec import Load, M, N, S, Where, k, param


class NoCpp(Exception):
    """What has no form here, with the reason."""


class _Elements(dict[str, str]):
    def __missing__(self, dtype: str) -> str:
        raise NoCpp(f"no C++ type for torch.{dtype}")


# Element types by the name that a torch dtype has without "torch.". NoCpp for any other.
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

_LARGEST_FLOAT = 3.4028234663852886e38
# Axes of an operand (call.h).
_MOST_AXES = 4


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
        if isinstance(expression, sympy.Add):
            return self._sum(expression, lazily)
        if isinstance(expression, sympy.floor):
            return self._floor(expression.args[0], lazily)
        ordered = self._ordered(expression)
        parts = [self.printed(arg, lazily=lazily) for arg in ordered]
        if isinstance(expression, Relational):
            return f"({parts[0]} {_RELATIONS[type(expression)]} {parts[1]})"
        if self._may_pass_32_bits(expression, ordered):
            parts[0] = f"int64_t({parts[0]})"
        if isinstance(expression, sympy.Pow):
            return _power(expression, parts[0])
        if isinstance(expression, sympy.Mod) and not self._whole(expression):
            raise NoCpp(f"no C++ of {expression}, which is not of whole numbers")
        form = _FORMS.get(expression.func)
        if form is None:
            raise NoCpp(f"no C++ of {expression.func.__name__}")
        return form(parts)

    def _sum(self, expression: Any, lazily: bool) -> str:
        """What is added first, then what is taken away."""
        terms = self._ordered(expression)
        taken = [term for term in terms if term.could_extract_minus_sign()]
        added = [self.printed(term, lazily=lazily) for term in terms if term not in taken]
        less = [self.printed(-term, lazily=lazily) for term in taken]
        return "(" + " - ".join([" + ".join(added) or "0", *less]) + ")"

    def _ordered(self, expression: Any) -> Sequence[Any]:
        """Arguments in an order that is the same in every process."""
        commutes = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.And, sympy.Or)
        if not isinstance(expression, commutes):
            return tuple(expression.args)
        # Whole numbers first: their sums and products are exact.
        return sorted(expression.args, key=lambda arg: (not self._whole(arg), str(arg)))

    def _whole(self, expression: Any) -> bool:
        """Whether C++ computes a number in whole ones."""
        if expression.is_Symbol:
            return bool(expression != S)
        if expression.is_number:
            return _is_int64(expression)
        if isinstance(expression, Load):
            return self.elements[int(expression.args[0])] in _WHOLE
        if isinstance(expression, Where):
            return all(self._whole(arg) for arg in expression.args[1:])
        if isinstance(expression, sympy.floor):
            return all(self._whole(part) for part in expression.args[0].as_numer_denom())
        if isinstance(expression, sympy.Pow):
            return bool(expression.exp != -1) and self._whole(expression.base)
        kept_whole = (sympy.Add, sympy.Mul, sympy.Mod, sympy.Abs, sympy.Max, sympy.Min)
        return isinstance(expression, kept_whole) and all(map(self._whole, expression.args))

    def _may_pass_32_bits(self, expression: Any, factors: Sequence[Any]) -> bool:
        """Whether it is a product in which a whole number meets more than a sign."""
        if isinstance(expression, sympy.Pow):
            return self._whole(expression)
        if not isinstance(expression, sympy.Mul):
            return False
        return sum(factor not in (1, -1) for factor in factors if self._whole(factor)) > 1

    def _floor(self, inside: Any, lazily: bool) -> str:
        # Divided as kernels/evaluate.py does: x / 41 is not x * (1 / 41).
        top, bottom = inside.as_numer_denom()
        numerator, denominator = (self.printed(e, lazily=lazily) for e in (top, bottom))
        if self._whole(top) and self._whole(bottom):
            return f"floor_divide({numerator}, {denominator})"
        return f"std::floor(float({numerator}) / float({denominator}))"

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
        return self.names.setdefault(text, f"operand{operand}_{len(self.names)}")

    def _element(self, operand: int, text: str) -> str:
        """An element as something that C++ computes with."""
        element = self.elements[operand]
        if element == "bool":
            return f"int({text} != 0)"
        if element == "int32_t":  # a sum may pass 32 bits
            return f"int64_t({text})"
        return f"to_float({text})" if element in ("Bfloat16", "Float16", "double") else text

    def _pointer(self, operand: int, index: Sequence[Any], lazily: bool = False) -> str:
        """Where an operand's element is; the last stride is 1."""
        if len(index) > _MOST_AXES:
            raise NoCpp(f"an operand of more than {_MOST_AXES} axes")
        element = self.elements[operand]
        stored = "uint8_t" if element == "bool" else element
        text = f"elements_of<{stored}>(call, {operand})"
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
    return found + [f"const int64_t p{i} = call.params[{i}];" for i in numbers]


def _is_int64(value: Any) -> bool:
    return bool(value.is_Integer and abs(value) < 1 << 63)


def number(value: Any) -> str:
    """A number as C++ writes it. NoCpp for one that a float cannot hold."""
    if _is_int64(value):
        text = str(value) if abs(value) < 1 << 30 else f"int64_t({value}LL)"
        return f"({text})" if value < 0 else text
    if value == sympy.oo or value == -sympy.oo:
        return "kInfinity" if value == sympy.oo else "-kInfinity"
    if value.is_extended_real is False:
        raise NoCpp(f"{value} is not a real number")
    real = float(value)
    if not abs(real) <= _LARGEST_FLOAT:
        raise NoCpp(f"{real} is beyond float32")
    text = f"{real!r}f"
    return f"({text})" if real < 0 else text


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
