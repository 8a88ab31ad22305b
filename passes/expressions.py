"""What one element of a tensor is, as a sympy expression: numbers, conditions, and both in one.

A condition is a sympy Boolean; where it is used as a number it is `Where(condition, 1, 0)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from adaattn_compiler.spec import Load, Where, k, q

# How the functions of transcendental functions begin.
INEXACT = "inexact_"


class RowStatistic(sympy.Function):  # type: ignore[misc]
    """A value that is the same for every key of a row (its max, its log-sum-exp)."""

    is_real = True
    is_number = False


class Trunc(sympy.Function):  # type: ignore[misc]
    """Rounding toward zero, as a cast from float to integer does."""

    is_integer = True

    @classmethod
    def eval(cls, value: Any) -> Any:
        if value.is_integer:
            return value
        if value.is_Number and value.is_finite:
            return sympy.Integer(int(value))
        return None


class Unreadable(Exception):
    """This op has no expression; its result is loaded instead."""


def is_condition(element: Any) -> bool:
    """Whether an element is a truth value (sympy counts every symbol among its Booleans)."""
    return isinstance(element, Boolean) and not isinstance(element, sympy.Symbol)


def as_number(element: Any) -> sympy.Expr:
    """A condition as 1 or 0; a number as it is."""
    if is_condition(element):
        return Where(element, sympy.Integer(1), sympy.Integer(0))
    return element


def as_condition(element: Any) -> Boolean:
    """A number as the condition that it is not 0; a condition as it is."""
    if is_condition(element):
        return element
    if isinstance(element, Where):
        condition, x, y = element.args
        return chosen_condition(condition, as_condition(x), as_condition(y))
    return sympy.Ne(element, 0)


def number_of(value: Any) -> Any:
    """A plain or symbolic number (or truth value) of a call as an expression."""
    if isinstance(value, sympy.Expr):
        return value
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise Unreadable("NaN")
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return (
            sympy.Integer(int(value))
            if value.is_integer() and abs(value) < 2**53
            else sympy.Float(value)
        )
    raise Unreadable(str(value))


def lifted(function: Callable[..., Any], *operands: Any) -> Any:
    """function(*operands), moved inside a Where when the other operands are plain numbers.

    `(1 - Where(c, 1, 0)) * m` becomes `Where(c, 0, m)`, the form that masks are recognized in.
    """
    conditions = {operand.args[0] for operand in operands if isinstance(operand, Where)}
    one = len(conditions) == 1 and all(isinstance(o, Where) or _is_plain(o) for o in operands)
    if not one and not (conditions and all(_is_choice_of_numbers(o) for o in operands)):
        return function(*operands)
    condition = min(conditions, key=sympy.default_sort_key)
    yes, no = (
        lifted(function, *(_branch(operand, condition, side) for operand in operands))
        for side in (1, 2)
    )
    if is_condition(yes) and is_condition(no):
        return chosen_condition(condition, yes, no)
    return Where(condition, as_number(yes), as_number(no))


def _branch(operand: Any, condition: Boolean, side: int) -> Any:
    """What an operand is where the condition holds (side 1) or does not (side 2)."""
    if isinstance(operand, Where):
        if operand.args[0] == condition:
            return _branch(operand.args[side], condition, side)
        return Where(operand.args[0], *(_branch(o, condition, side) for o in operand.args[1:]))
    return operand


def _is_plain(operand: Any) -> bool:
    return isinstance(operand, sympy.Basic) and not operand.free_symbols and not operand.has(Load)


def _is_choice_of_numbers(operand: Any, depth: int = 3) -> bool:
    """Whether an operand is one of few numbers, by conditions."""
    if isinstance(operand, Where) and depth > 0:
        return all(_is_choice_of_numbers(o, depth - 1) for o in operand.args[1:])
    return isinstance(operand, sympy.Number) or operand in (sympy.oo, -sympy.oo)


def chosen_condition(condition: Boolean, yes: Boolean, no: Boolean) -> Boolean:
    """`condition ? yes : no` without what is said twice."""
    if no == sympy.false:
        return sympy.And(condition, yes)
    if yes == sympy.true:
        return sympy.Or(condition, no)
    if yes == sympy.false:
        return sympy.And(sympy.Not(condition), no)
    if no == sympy.true:
        return sympy.Or(sympy.Not(condition), yes)
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def settled(element: Any, dtype: torch.dtype) -> Any:
    """The element as its dtype has it: numbers past its range are infinite, none is NaN.

    A choice among summands keeps its numbers inside: `2 * Where(c, 0, v)` is `Where(c, 0, 2 * v)`.
    """
    if is_condition(element) or not dtype.is_floating_point:
        return element
    if element.has(sympy.nan, sympy.zoo):
        raise Unreadable("NaN")
    if isinstance(element, sympy.Add):
        return sympy.Add(*(settled(term, dtype) for term in element.args))
    if isinstance(element, sympy.Mul) and any(isinstance(f, Where) for f in element.args):
        element = lifted(sympy.Mul, *element.args)
        if isinstance(element, sympy.Mul):
            return element
    if isinstance(element, Where):
        condition, x, y = element.args
        return Where(condition, settled(x, dtype), settled(y, dtype))
    if element.is_Number and element.is_finite and abs(element) > torch.finfo(dtype).max:
        return sympy.oo * sympy.sign(element)
    return element


def may_wrap(element: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor of whole numbers was computed of data and may not hold what that makes.

    uint8 numbers wrap at 256, int32 ones at 2^31; expressions have no such ends. Positions and
    booleans are too small to get there.
    """
    return _is_narrow(dtype) and _computes_with_data(element)


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether whole numbers of one dtype may be others in another."""
    if target == torch.bool or not (_is_whole(source) and _is_whole(target)):
        return False
    before, after = torch.iinfo(source), torch.iinfo(target)
    return after.min > before.min or after.max < before.max


def holds_data(element: Any) -> bool:
    """Whether a number is, or is made of, what a tensor of numbers holds."""
    if isinstance(element, (Boolean, Relational)):
        return False
    if isinstance(element, Load):
        return True
    args = element.args[1:] if isinstance(element, Where) else element.args
    return any(holds_data(arg) for arg in args)


def _computes_with_data(element: Any) -> bool:
    if isinstance(element, (Boolean, Relational, Load)):
        return False
    if isinstance(element, (sympy.Add, sympy.Mul, sympy.Pow, sympy.Abs)):
        return holds_data(element)
    args = element.args[1:] if isinstance(element, Where) else element.args
    return any(_computes_with_data(arg) for arg in args)


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _is_narrow(dtype: torch.dtype) -> bool:
    return _is_whole(dtype) and dtype != torch.int64


def holds_integers(dtype: torch.dtype) -> bool:
    """Whether every position there can be (below 2**24) is a number of this dtype."""
    return dtype not in (torch.float16, torch.bfloat16)


def is_exact(element: Any) -> bool:
    """Whether an expression can be computed anew, in any order, with the same result in meaning.

    In a condition, what is computed of positions must be integers throughout: `k / 3.0 >= 2.0` may
    be decided by a rounding. (Quotients of integers may be floored: they are too far from the next
    integer for that.)
    """
    if any(str(f.func).startswith(INEXACT) for f in element.atoms(sympy.Function)):
        return False
    if element.has(Trunc, RowStatistic):
        return False
    return all(
        _is_of_integers(relation) for relation in element.atoms(Relational) if relation.has(q, k)
    )


def _is_of_integers(relation: Any) -> bool:
    if relation.has(sympy.Float):
        return False
    if any(not f.args[0].as_numer_denom()[1].is_Integer for f in relation.atoms(sympy.floor)):
        return False
    number = sympy.Dummy(integer=True)
    whole = relation.replace(Load, lambda *_: number)
    return all(side.is_integer for side in (whole.args or ()))
