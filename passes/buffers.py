"""Masks that a module keeps as a buffer, read as predicates.

A buffer holds data, but its values are there when compiling: a triangle, a band or blocks of two
values are recognized and then compared element by element. Whoever uses one is compiled under the
assumption that the buffer keeps these values; the runtime checks that on every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch

from adaattn_compiler.spec import Where

# Larger buffers are not read: comparing them would cost more than a moment.
_MOST_ELEMENTS = 1 << 26


def as_expression(buffer: torch.Tensor, row: sympy.Expr, column: sympy.Expr) -> Any | None:
    """The element at (row, column) of the last two dimensions of a buffer of two values.

    All other dimensions must be of size 1. None where the buffer is no mask that is recognized.
    """
    if buffer.dim() < 2 or buffer.numel() > _MOST_ELEMENTS or buffer.numel() == 0:
        return None
    if any(size != 1 for size in buffer.shape[:-2]):
        return None
    table = buffer.detach().reshape(buffer.shape[-2:])
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


def _chosen(predicate: Any, yes: torch.Tensor, no: torch.Tensor) -> Any:
    if yes.dtype == torch.bool:
        return predicate if bool(yes) else sympy.Not(predicate)
    return Where(predicate, _value(yes), _value(no))


def _value(scalar: torch.Tensor) -> sympy.Expr:
    number = scalar.item()
    if number == float("-inf"):
        return -sympy.oo
    return sympy.Integer(int(number)) if float(number).is_integer() else sympy.Float(number)


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
    """Bands whose edges are read from a row in the middle, and blocks from the first row."""
    middle = holds.shape[0] // 2
    inside = holds[middle].nonzero()
    if inside.numel() == 0:
        return
    before = middle - int(inside[0])
    after = int(inside[-1]) - middle
    lower = (sympy.Ge(column, row - before), c >= r - before)
    upper = (sympy.Le(column, row + after), c <= r + after)
    yield upper
    yield lower
    yield sympy.And(lower[0], upper[0]), lower[1] & upper[1]
    size = int(holds[0].sum())
    if 0 < size < holds.shape[1]:
        yield (
            sympy.Eq(sympy.floor(row / size), sympy.floor(column / size)),
            torch.div(r, size, rounding_mode="floor") == torch.div(c, size, rounding_mode="floor"),
        )
