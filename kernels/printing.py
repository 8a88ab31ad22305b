"""A spec's expressions as text in a language with C's numbers: what C++ and Triton have in common.

Whole numbers of 32 bits stay whole; products of them, and whatever else may pass 32 bits, are made
of 64. Positions are below 2^30, so that a sum of two is one of 32 bits. Terms stand in an order
that is the same in every process, whole ones first: their sums and products are exact.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import sympy
from sympy.core.relational import Relational

from adaattn_compiler.spec import Load, S, Where

_LARGEST_FLOAT = 3.4028234663852886e38

Form = Callable[[list[str]], str]


class NoCode(Exception):
    """What has no form in a language, with the reason."""


class Printer(abc.ABC):
    """One language; `guard`: the condition under which an expression is evaluated at all."""

    language: ClassVar[str]
    forms: ClassVar[Mapping[Any, Form]]  # of functions whose arguments are printed alike

    def printed(self, expression: Any, guard: str | None = None) -> str:
        """An expression. NoCode for what has no form."""
        if expression in (sympy.true, sympy.false):
            return self.truth(expression == sympy.true)
        if expression.is_Symbol:
            return self.symbol(expression)
        if expression.is_number:
            return self.number(expression)
        if isinstance(expression, Load):
            return self.load(expression, guard)
        if isinstance(expression, Where):
            return self.choice(expression, guard)
        if isinstance(expression, sympy.Add):
            return self._sum(expression, guard)
        if isinstance(expression, sympy.floor):
            return self.floor(expression.args[0], guard)
        ordered = self._ordered(expression)
        parts = [self.printed(arg, guard) for arg in ordered]
        if isinstance(expression, Relational):
            return f"({parts[0]} {_RELATIONS[type(expression)]} {parts[1]})"
        if self._may_pass_32_bits(expression, ordered):
            parts[0] = self.wide(parts[0])
        if isinstance(expression, sympy.Pow):
            return self._power(expression, parts[0])
        if isinstance(expression, sympy.Mod) and not self.is_whole(expression):
            raise NoCode(f"no {self.language} of {expression}, which is not of whole numbers")
        form = self.forms.get(expression.func)
        if form is None:
            raise NoCode(f"no {self.language} of {expression.func.__name__}")
        return form(parts)

    # -- what a language has of its own ------------------------------------------------------------

    @abc.abstractmethod
    def truth(self, value: bool) -> str:
        """A condition that is known."""

    @abc.abstractmethod
    def real(self, value: float) -> str:
        """A number of 32 bits, maybe infinite."""

    @abc.abstractmethod
    def integer(self, value: int) -> str:
        """A whole number of at most 64 bits, its sign apart."""

    @abc.abstractmethod
    def load(self, load: Load, guard: str | None) -> str:
        """The element of an operand."""

    @abc.abstractmethod
    def choice(self, where: Where, guard: str | None) -> str:
        """One of two, by a condition that guards both."""

    @abc.abstractmethod
    def wide(self, text: str) -> str:
        """A whole number, of 64 bits from here on."""

    @abc.abstractmethod
    def quotient(self, numerator: str, denominator: str, whole: bool) -> str:
        """Division rounded towards minus infinity; whole: of whole numbers."""

    @abc.abstractmethod
    def reciprocal(self, text: str) -> str:
        """1 divided by it."""

    @abc.abstractmethod
    def is_whole_operand(self, operand: int) -> bool:
        """Whether the elements of an operand are whole numbers (or truths) here."""

    def symbol(self, symbol: Any) -> str:
        """A position, a size or a number known at run time."""
        return str(symbol)

    # -- what is the same in all -------------------------------------------------------------------

    def number(self, value: Any) -> str:
        """A number that is known. NoCode for one that a float cannot hold."""
        if _is_int64(value):
            return _signed(self.integer(abs(int(value))), value < 0)
        if value in (sympy.oo, -sympy.oo):
            return _signed(self.real(float("inf")), value < 0)
        if value.is_extended_real is False:
            raise NoCode(f"{value} is not a real number")
        real = float(value)
        if not abs(real) <= _LARGEST_FLOAT:
            raise NoCode(f"{real} is beyond float32")
        return _signed(self.real(abs(real)), real < 0)

    def is_whole(self, expression: Any) -> bool:
        """Whether a number is computed in whole ones."""
        if expression.is_Symbol:
            return bool(expression != S)
        if expression.is_number:
            return _is_int64(expression)
        if isinstance(expression, Load):
            return self.is_whole_operand(int(expression.args[0]))
        if isinstance(expression, Where):
            return all(self.is_whole(arg) for arg in expression.args[1:])
        if isinstance(expression, sympy.floor):
            return all(self.is_whole(part) for part in expression.args[0].as_numer_denom())
        if isinstance(expression, sympy.Pow):
            return bool(expression.exp != -1) and self.is_whole(expression.base)
        kept_whole = (sympy.Add, sympy.Mul, sympy.Mod, sympy.Abs, sympy.Max, sympy.Min)
        return isinstance(expression, kept_whole) and all(map(self.is_whole, expression.args))

    def floor(self, inside: Any, guard: str | None) -> str:
        """Divided as kernels/evaluate.py does: x / 41 is not x * (1 / 41)."""
        top, bottom = inside.as_numer_denom()
        numerator, denominator = (self.printed(part, guard) for part in (top, bottom))
        return self.quotient(numerator, denominator, self.is_whole(top) and self.is_whole(bottom))

    def _sum(self, expression: Any, guard: str | None) -> str:
        """What is added first, then what is taken away."""
        terms = self._ordered(expression)
        taken = [term for term in terms if term.could_extract_minus_sign()]
        added = [self.printed(term, guard) for term in terms if term not in taken]
        less = [self.printed(-term, guard) for term in taken]
        return "(" + " - ".join([" + ".join(added) or "0", *less]) + ")"

    def _ordered(self, expression: Any) -> Sequence[Any]:
        commutes = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.And, sympy.Or)
        if not isinstance(expression, commutes):
            return tuple(expression.args)
        return sorted(expression.args, key=lambda arg: (not self.is_whole(arg), str(arg)))

    def _may_pass_32_bits(self, expression: Any, factors: Sequence[Any]) -> bool:
        """Whether it is a product in which a whole number meets more than a sign."""
        if isinstance(expression, sympy.Pow):
            return self.is_whole(expression)
        if not isinstance(expression, sympy.Mul):
            return False
        return sum(factor not in (1, -1) for factor in factors if self.is_whole(factor)) > 1

    def _power(self, expression: Any, base: str) -> str:
        exponent = expression.exp
        if exponent == -1:
            return self.reciprocal(base)
        if exponent.is_Integer and 1 < exponent <= 4:
            return "(" + " * ".join([base] * int(exponent)) + ")"
        raise NoCode(f"no {self.language} of {expression}")


def _is_int64(value: Any) -> bool:
    return bool(value.is_Integer and abs(value) < 1 << 63)


def _signed(text: str, negative: bool) -> str:
    return f"(-{text})" if negative else text


def joined(sign: str) -> Form:
    """Parts with a sign between each two."""
    return lambda parts: "(" + f" {sign} ".join(parts) + ")"


def nested(function: str) -> Form:
    """A function of two, of all parts."""

    def form(parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else f"{function}({parts[0]}, {form(parts[1:])})"

    return form


# Of functions that are called alike wherever they are not part of the language.
SHARED_FORMS: Mapping[Any, Form] = {
    sympy.Mul: joined("*"),
    sympy.And: joined("&"),
    sympy.Or: joined("|"),
    sympy.Mod: lambda parts: f"modulo({parts[0]}, {parts[1]})",
    sympy.Max: nested("maximum"),
    sympy.Min: nested("minimum"),
}

_RELATIONS = {
    sympy.Ge: ">=",
    sympy.Gt: ">",
    sympy.Le: "<=",
    sympy.Lt: "<",
    sympy.Eq: "==",
    sympy.Ne: "!=",
}
