"""Masks that a module keeps as a buffer, read as predicates.

A buffer holds data, but its values are there when compiling: a triangle, a band or blocks of two
values are recognized and then compared element by element. Whoever uses one is compiled under the
assumption that the buffer keeps these values; the runtime checks that on every call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch

from adaattn_compiler.spec import Where

# Larger buffers are not read: comparing them would cost more than a moment.
_MOST_ELEMENTS = 1 << 26
# Integers from here on are not all numbers of float64; as Python's they would overflow an int64.
_LARGE = 2**53

_READABLE = frozenset(
    {
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    }
)


def as_expression(buffer: torch.Tensor, row: sympy.Expr, column: sympy.Expr) -> Any | None:
    """The element at (row, column) of the last two dimensions of a buffer of two values.

    All other dimensions must be of size 1. None where the buffer is no mask that is recognized.
    """
    if not _is_readable(buffer):
        return None
    table = buffer.detach().reshape(buffer.shape[-2:]).cpu()
    first = table[0, 0]
    same = table == first
    rest = table[~same]
    if rest.numel() == 0:
        return None
    second = rest[0]
    if not bool((rest == second).all()):  # a third value, or NaN
        return None
    for holds, yes, no in ((same, first, second), (~same, second, first)):
        predicate = _predicate(holds, row, column)
        if predicate is not None:
            return _chosen(predicate, yes, no)
    return None


def _is_readable(buffer: torch.Tensor) -> bool:
    if buffer.is_meta or buffer.layout != torch.strided or buffer.dtype not in _READABLE:
        return False
    if buffer.dim() < 2 or not 0 < buffer.numel() <= _MOST_ELEMENTS:
        return False
    return all(size == 1 for size in buffer.shape[:-2])


def _chosen(predicate: Any, yes: torch.Tensor, no: torch.Tensor) -> Any:
    if yes.dtype == torch.bool:
        return predicate if bool(yes) else sympy.Not(predicate)
    return Where(predicate, _value(yes), _value(no))


def _value(scalar: torch.Tensor) -> sympy.Expr:
    number = float(scalar)
    if math.isinf(number):
        return sympy.oo if number > 0 else -sympy.oo
    if number.is_integer() and abs(number) < _LARGE:
        return sympy.Integer(int(number))
    return sympy.Float(number) if scalar.is_floating_point() else sympy.Integer(int(scalar))


def _predicate(holds: torch.Tensor, row: sympy.Expr, column: sympy.Expr) -> Any | None:
    rows, columns = holds.shape
    r = torch.arange(rows).reshape(-1, 1)
    c = torch.arange(columns)
    for symbolic, concrete in _candidates(holds, row, column, r, c):
        if torch.equal(concrete.expand(rows, columns), holds):
            return symbolic
    return None


def _candidates(
    holds: torch.Tensor, row: sympy.Expr, column: sympy.Expr, r: torch.Tensor, c: torch.Tensor
) -> Iterator[tuple[Any, torch.Tensor]]:
    """The band from the least to the largest `column - row` that holds, its sides, and blocks."""
    least, most = _extent(holds)
    lower = (sympy.Ge(column, row + least), c >= r + least)
    upper = (sympy.Le(column, row + most), c <= r + most)
    yield upper
    yield lower
    yield sympy.And(lower[0], upper[0]), lower[1] & upper[1]
    size = max(int(holds[0].sum()), int(holds[:, 0].sum()))
    if size > 0:
        yield (
            sympy.Eq(sympy.floor(row / size), sympy.floor(column / size)),
            torch.div(r, size, rounding_mode="floor") == torch.div(c, size, rounding_mode="floor"),
        )


def _extent(holds: torch.Tensor) -> tuple[int, int]:
    """The least and the largest `column - row` of elements that hold (some do)."""
    rows = holds.any(1).nonzero().flatten()
    inside = holds[rows].to(torch.uint8)
    first = inside.argmax(1)
    last = holds.shape[1] - 1 - inside.flip(1).argmax(1)
    return int((first - rows).min()), int((last - rows).max())
