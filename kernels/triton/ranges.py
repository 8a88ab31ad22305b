"""Between which keys a block of query rows attends, in closed form: no table, whatever the lengths.

From a predicate follow four whole numbers for rows FIRST to LAST (both included): every attended
key lies in [low, high] of `some`, and every key of [low, high] of `every` is attended by each of
the rows. They are found by interval arithmetic over the rows, and hold for any predicate: of what
is not understood (data, another head's rule) `some` is every key and `every` none. Where a mask has
holes (the first keys and a window, every other chunk) the hull is larger than what is attended;
`ranges_are_exact` says so, and a table of blocks (tables.py) is the better form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Or

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.evaluate import evaluate
from adaattn_compiler.predicates import normalized
from adaattn_compiler.spec import Load, M, N, Where, k, param, q

# The first and the last row of a block; or key, where keys are asked which rows attend to them.
FIRST, LAST = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("first", "last"))


@dataclass(frozen=True)
class Interval:
    """Whole numbers from low to high, both included; none where low is above high."""

    low: Any
    high: Any


@dataclass(frozen=True)
class Ranges:
    """See the module's docstring; expressions over b, h, M, N, run-time integers, FIRST, LAST."""

    some: Interval
    every: Interval


def key_ranges(mask: Any) -> Ranges:
    """The keys that a block of rows attends to."""
    return _ranges(normalized(mask))


def row_ranges(mask: Any) -> Ranges:
    """The rows that attend to a block of keys."""
    exchange = {q: k, k: q, M: N, N: M}
    found = key_ranges(sympy.sympify(mask).xreplace(exchange))
    return Ranges(*(_replaced(interval, exchange) for interval in (found.some, found.every)))


def _replaced(interval: Interval, exchange: dict[Any, Any]) -> Interval:
    low, high = (sympy.sympify(end).xreplace(exchange) for end in (interval.low, interval.high))
    return Interval(low, high)


# Of keys; nothing is below 0 or above N - 1, and what is empty stays so beside anything.
_ALL, _NONE = Interval(sympy.Integer(0), N - 1), Interval(N, sympy.Integer(-1))
_UNKNOWN = Ranges(_ALL, _NONE)


class _NotUnderstood(Exception):
    """A number that has no bounds here."""


def _ranges(predicate: Any) -> Ranges:
    if predicate == sympy.true:
        return Ranges(_ALL, _ALL)
    if predicate == sympy.false:
        return Ranges(_NONE, _NONE)
    if isinstance(predicate, And):
        parts = [_ranges(part) for part in predicate.args]
        return Ranges(_common([p.some for p in parts]), _common([p.every for p in parts]))
    if isinstance(predicate, Or):
        parts = [_ranges(part) for part in predicate.args]
        return Ranges(_hull([p.some for p in parts]), _longest([p.every for p in parts]))
    if isinstance(predicate, Relational) and not predicate.has(Load):
        try:
            return _compared(predicate)
        except _NotUnderstood:
            pass
    return _UNKNOWN


def _common(intervals: Sequence[Interval]) -> Interval:
    return Interval(
        sympy.Max(*(interval.low for interval in intervals)),
        sympy.Min(*(interval.high for interval in intervals)),
    )


def _hull(intervals: Sequence[Interval]) -> Interval:
    return Interval(
        sympy.Min(*(interval.low for interval in intervals)),
        sympy.Max(*(interval.high for interval in intervals)),
    )


def _longest(intervals: Sequence[Interval]) -> Interval:
    longest = intervals[0]
    for interval in intervals[1:]:
        if interval == _NONE or longest == _NONE:
            longest = longest if interval == _NONE else interval
            continue
        longer = sympy.Ge(longest.high - longest.low, interval.high - interval.low)
        longest = Interval(
            Where(longer, longest.low, interval.low), Where(longer, longest.high, interval.high)
        )
    return longest


# -- comparisons -----------------------------------------------------------------------------------


def _compared(relation: Relational) -> Ranges:
    """A comparison in normal form."""
    if relation.rhs != 0 or not relation.lhs.is_integer:
        raise _NotUnderstood
    if isinstance(relation, sympy.Ge):
        return _not_negative(relation.lhs)
    if isinstance(relation, sympy.Eq):
        parts = [_not_negative(relation.lhs), _not_negative(sympy.expand(-relation.lhs))]
        return Ranges(_common([p.some for p in parts]), _common([p.every for p in parts]))
    raise _NotUnderstood


def _not_negative(expression: Any) -> Ranges:
    """`expression >= 0`, solved for k: k >= bound or k <= bound, with a bound over the rows."""
    with_key = [term for term in sympy.Add.make_args(expression) if term.has(k)]
    if not with_key:
        least, most = _extremes(expression)
        return Ranges(_where(sympy.Ge(most, 0)), _where(sympy.Ge(least, 0)))
    if len(with_key) > 1:
        raise _NotUnderstood
    slope, of_key = with_key[0].as_coeff_Mul()
    if not slope.is_Integer:
        raise _NotUnderstood
    rest = sympy.expand(expression - with_key[0])
    shift, divisor = _whole_part(of_key)
    if slope > 0:  # floor((k + shift) / divisor) >= ceil(-rest / slope)
        least, most = _extremes(divisor * _ceiling(-rest, slope) - shift)
        return Ranges(Interval(least, N - 1), Interval(most, N - 1))
    least, most = _extremes(divisor * _floor(rest, -slope) + divisor - 1 - shift)
    return Ranges(Interval(sympy.Integer(0), most), Interval(sympy.Integer(0), least))


def _whole_part(expression: Any) -> tuple[Any, Any]:
    """(shift, divisor) of floor((k + shift) / divisor)."""
    if expression == k:
        return sympy.Integer(0), sympy.Integer(1)
    if isinstance(expression, sympy.floor):
        numerator, denominator = expression.args[0].as_numer_denom()
        shift = sympy.expand(numerator - k)
        if denominator.is_Integer and not shift.has(k):
            return shift, denominator
    raise _NotUnderstood


def _floor(numerator: Any, denominator: Any) -> Any:
    return numerator if denominator == 1 else sympy.floor(numerator / denominator)


def _ceiling(numerator: Any, denominator: Any) -> Any:
    return _floor(sympy.expand(numerator + denominator - 1), denominator)


def _where(condition: Any) -> Interval:
    """Every key where a condition of the rows holds, else none."""
    return Interval(Where(condition, _ALL.low, _NONE.low), Where(condition, _ALL.high, _NONE.high))


# -- numbers ---------------------------------------------------------------------------------------


def _extremes(expression: Any) -> tuple[Any, Any]:
    """Bounds of a whole number over the rows FIRST to LAST."""
    if not expression.has(q):
        return expression, expression
    if expression == q:
        return FIRST, LAST
    rule = _RULES.get(expression.func)
    if rule is None:
        raise _NotUnderstood
    return rule(expression)


def _of_sum(expression: Any) -> tuple[Any, Any]:
    ends = [_extremes(term) for term in expression.args]
    least, most = (sympy.Add(*(end[side] for end in ends)) for side in (0, 1))
    return least, most


def _of_product(expression: Any) -> tuple[Any, Any]:
    number, rest = expression.as_coeff_Mul()
    if not number.is_Integer or number == 1:
        raise _NotUnderstood
    least, most = _extremes(rest)
    return (number * least, number * most) if number > 0 else (number * most, number * least)


def _of_floor(expression: Any) -> tuple[Any, Any]:
    numerator, denominator = expression.args[0].as_numer_denom()
    if not (denominator.is_Integer and denominator > 0):
        raise _NotUnderstood
    least, most = _extremes(sympy.expand(numerator))
    return sympy.floor(least / denominator), sympy.floor(most / denominator)


def _of_remainder(expression: Any) -> tuple[Any, Any]:
    divisor = expression.args[1]
    if not (divisor.is_Integer and divisor > 0):
        raise _NotUnderstood
    return sympy.Integer(0), divisor - 1


def _of_extreme(expression: Any) -> tuple[Any, Any]:
    ends = [_extremes(arg) for arg in expression.args]
    least, most = (expression.func(*(end[side] for end in ends)) for side in (0, 1))
    return least, most


_RULES: dict[Any, Callable[[Any], tuple[Any, Any]]] = {
    sympy.Add: _of_sum,
    sympy.Mul: _of_product,
    sympy.floor: _of_floor,
    sympy.Mod: _of_remainder,
    sympy.Max: _of_extreme,
    sympy.Min: _of_extreme,
}


# -- beside the blocks -----------------------------------------------------------------------------


def ranges_are_exact(
    mask: Any, sizes: tuple[int, int], block: tuple[int, int], params: Sequence[int] = ()
) -> bool:
    """Whether, on M rows and N keys in such blocks, no block is visited in vain or masked in vain.

    Beside kernels/blocks.py, which knows nothing of what reads data or depends on the head: there
    ranges may know more.
    """
    rows, columns = sizes
    if 0 in sizes:
        return True
    structure = block_structure(mask, rows, columns, *block, params)
    visited, full = blocks_of_ranges(key_ranges(mask), sizes, block, params)
    wanted = structure.partial | structure.full
    return bool((visited <= wanted).all()) and bool((structure.full <= full).all())


def blocks_of_ranges(
    ranges: Ranges, sizes: tuple[int, int], block: tuple[int, int], params: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """(visited, full), bool [Qb, Kb]: what a kernel makes of ranges of the first head."""
    first = torch.arange(0, sizes[0], block[0])
    known: dict[sympy.Symbol, Any] = {
        **{FIRST: first, LAST: (first + block[0] - 1).clamp(max=sizes[0] - 1)},
        **dict.fromkeys(sympy.symbols("b h", integer=True, nonnegative=True), 0),
        **{M: sizes[0], N: sizes[1]},
        **{param(i): value for i, value in enumerate(params)},
    }

    def ends(interval: Interval) -> list[torch.Tensor]:
        found = (evaluate(sympy.sympify(e), known, _no_load) for e in (interval.low, interval.high))
        return [torch.as_tensor(end).expand(len(first))[:, None] for end in found]

    keys = torch.arange(0, sizes[1], block[1])
    last_keys = (keys + block[1] - 1).clamp(max=sizes[1] - 1)
    low, high = ends(ranges.some)
    full_low, full_high = ends(ranges.every)
    visited = (keys <= high) & (last_keys >= low) & (low <= high)
    return visited, visited & (keys >= full_low) & (last_keys <= full_high)


def _no_load(number: int, index: tuple[sympy.Expr, ...]) -> Any:
    raise NotImplementedError("ranges read no tensors")
