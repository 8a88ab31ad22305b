"""Views as index maps.

Every view op (view, expand, permute, slice, repeat_interleave, ...) says at which index of its
input an index of its output lies. Following those maps from a contraction up to its operands
dissolves all spellings of a layout: that K is shared by the query heads of a group shows as the
term `h // group`, however the model wrote it.

An `Index` is a sum of terms, each a loop axis or a digit of one, `(axis // div) % mod`, times a
coefficient, plus a constant. Sizes are sympy integers or expressions of positive integer symbols
(a symbolic shape). What has no such form raises `NotAffine`; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

Size: TypeAlias = sympy.Expr
ONE = sympy.Integer(1)
ZERO = sympy.Integer(0)


class NotAffine(Exception):
    """An index that is not a sum of axis digits."""


@dataclass(frozen=True)
class Axis:
    """A loop axis: 0 <= axis < size."""

    name: str
    size: Size

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Digit:
    """`(axis // div) % extent`: 0 <= digit < extent, and div * extent divides the axis' size."""

    axis: Axis
    div: Size
    extent: Size

    def split(self, inner: Size) -> tuple[Digit, Digit]:
        """(outer, inner) digits with `self = outer * inner + inner digit`."""
        outer = exact_quotient(self.extent, inner)
        return (
            Digit(self.axis, sympy.expand(self.div * inner), outer),
            Digit(self.axis, self.div, inner),
        )


@dataclass(frozen=True)
class Index:
    """`sum(coefficient * digit) + constant`."""

    terms: tuple[tuple[Digit, Size], ...] = ()
    constant: Size = ZERO

    @staticmethod
    def of_axis(axis: Axis) -> Index:
        """The index that is the axis itself (0 where its size is 1)."""
        if axis.size == 1:
            return Index()
        return Index(((Digit(axis, ONE, axis.size), ONE),))

    @staticmethod
    def of_constant(value: Any) -> Index:
        return Index((), sympy.sympify(value))

    def scaled(self, factor: Size) -> Index:
        terms = tuple((digit, sympy.expand(coef * factor)) for digit, coef in self.terms)
        return Index(terms, sympy.expand(self.constant * factor))

    def plus(self, other: Index) -> Index:
        sums: dict[Digit, Size] = dict(self.terms)
        for digit, coef in other.terms:
            sums[digit] = sums.get(digit, ZERO) + coef
        terms = tuple((digit, coef) for digit, coef in sums.items() if coef != 0)
        return Index(_fused(terms), sympy.expand(self.constant + other.constant))

    @property
    def axes(self) -> frozenset[Axis]:
        return frozenset(digit.axis for digit, _ in self.terms)

    @property
    def largest(self) -> Size:
        """The greatest value, all coefficients being positive."""
        total = self.constant
        for digit, coef in self.terms:
            if not (coef.is_nonnegative or coef.is_positive):
                raise NotAffine(f"coefficient {coef} may be negative")
            total += coef * (digit.extent - 1)
        return sympy.expand(total)

    def expression(self, names: Mapping[Axis, sympy.Expr]) -> sympy.Expr:
        """As a sympy expression, each axis replaced by names[axis]."""
        return sympy.Add(
            self.constant, *(coef * digit_expression(d, names[d.axis]) for d, coef in self.terms)
        )


def _fused(terms: tuple[tuple[Digit, Size], ...]) -> tuple[tuple[Digit, Size], ...]:
    """The same sum with adjacent digits of one axis joined: `(a // 4) * 4 + a % 4` is `a`."""
    for outer, outer_coef in terms:
        for inner, inner_coef in terms:
            if (
                outer.axis == inner.axis
                and outer.div == sympy.expand(inner.div * inner.extent)
                and outer_coef == sympy.expand(inner_coef * inner.extent)
            ):
                whole = Digit(inner.axis, inner.div, sympy.expand(inner.extent * outer.extent))
                rest = tuple(term for term in terms if term[0] not in (outer, inner))
                return _fused((*rest, (whole, inner_coef)))
    return terms


def digit_expression(digit: Digit, value: sympy.Expr) -> sympy.Expr:
    """`(value // div) % extent`, leaving out what changes nothing."""
    if digit.div != 1:
        value = sympy.floor(value / digit.div)
    covers = sympy.expand(digit.div * digit.extent - digit.axis.size) == 0
    return value if covers else sympy.Mod(value, digit.extent)


def is_less(smaller: Size, larger: Size) -> bool:
    """Whether smaller < larger for all values of the symbols (sizes are at least 1)."""
    return bool(sympy.expand(larger - smaller - 1).is_nonnegative)


def exact_quotient(size: Size, divisor: Size) -> Size:
    """size / divisor where that is a polynomial with integer coefficients; else NotAffine."""
    if divisor == 1:
        return size
    if size == divisor:
        return ONE
    if divisor == 0:
        raise NotAffine("an empty dimension")
    if size.is_Integer and divisor.is_Integer:
        if int(size) % int(divisor):
            raise NotAffine(f"{divisor} does not divide {size}")
        return sympy.Integer(int(size) // int(divisor))
    quotient = sympy.cancel(size / divisor)
    if sympy.denom(quotient) != 1 or not quotient.is_integer:
        raise NotAffine(f"{divisor} does not divide {size}")
    return sympy.expand(quotient)


def flatten(index: Sequence[Index], sizes: Sequence[Size]) -> Index:
    """The row-major offset of an index tuple."""
    flat, stride = Index(), ONE
    for position, size in zip(reversed(index), reversed(sizes), strict=True):
        flat = flat.plus(position.scaled(stride))
        stride = sympy.expand(stride * size)
    return flat


def unflatten(flat: Index, sizes: Sequence[Size]) -> tuple[Index, ...]:
    """The index tuple whose row-major offset is `flat`."""
    out: list[Index] = []
    for size in reversed(sizes[1:]):
        flat, remainder = divide(flat, size)
        out.append(remainder)
    return (flat, *reversed(out)) if sizes else ()


def divide(index: Index, size: Size) -> tuple[Index, Index]:
    """(index // size, index % size), splitting digits where size cuts through one."""
    if size == 1:
        return index, Index()
    quotient: dict[Digit, Size] = {}
    remainder: dict[Digit, Size] = {}
    for digit, coef in index.terms:
        try:
            quotient[digit] = exact_quotient(coef, size)
            continue
        except NotAffine:
            pass
        if is_less(sympy.expand(coef * digit.extent) - 1, size):
            remainder[digit] = coef
            continue
        outer, inner = digit.split(exact_quotient(size, coef))
        quotient[outer] = ONE
        remainder[inner] = coef
    constant = index.constant
    if constant.is_Integer and size.is_Integer:
        whole, part = divmod(int(constant), int(size))
    elif constant == 0:
        whole, part = 0, 0
    else:
        raise NotAffine(f"offset {constant} in a dimension of size {size}")
    low = Index(tuple(remainder.items()), sympy.Integer(part))
    if not is_less(low.largest, size):
        raise NotAffine(f"index {low} is not below {size}")
    return Index(tuple(quotient.items()), sympy.Integer(whole)), low


def reshaped(
    index: Sequence[Index], from_sizes: Sequence[Size], to_sizes: Sequence[Size]
) -> tuple[Index, ...]:
    """The index into a tensor of to_sizes that holds the same element as `index` of from_sizes."""
    if tuple(from_sizes) == tuple(to_sizes):
        return tuple(index)
    # Dimensions shared at either end need no arithmetic (and stay exact for symbolic sizes).
    head = 0
    while head < min(len(from_sizes), len(to_sizes)) and from_sizes[head] == to_sizes[head]:
        head += 1
    tail = 0
    while (
        tail < min(len(from_sizes), len(to_sizes)) - head
        and from_sizes[len(from_sizes) - 1 - tail] == to_sizes[len(to_sizes) - 1 - tail]
    ):
        tail += 1
    middle_from = from_sizes[head : len(from_sizes) - tail]
    middle_to = to_sizes[head : len(to_sizes) - tail]
    middle = index[head : len(index) - tail]
    if not middle_to:
        inner: tuple[Index, ...] = ()
    else:
        inner = unflatten(flatten(middle, middle_from), middle_to)
    return (*index[:head], *inner, *index[len(index) - tail :])
