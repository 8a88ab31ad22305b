"""From the expression of a score to scale, score and mask.

`score_parts` takes the element of a softmax's argument, in which one symbol stands for the raw
product q . k, and parts it: conditions that shut a key out become the mask, the numeric factor of
the product becomes the scale, values that are the same for a whole row are dropped (softmax does
not see them), the rest is the score.

A key is shut out by -inf, or by a finite number so low that no score is seen beside it. As long as
a row has another key the two are the same. Where a row may have none, they are not: see
Note [Rows without a key].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from adaattn_compiler.passes.expressions import RowStatistic, is_exact
from adaattn_compiler.spec import EmptyRow, Load, Refusal, S, Where, k, q

RAW = sympy.Symbol("q_dot_k", real=True)

# A finite fill at or below this shuts a key out as surely as -inf: a score would have to be of this
# size to be seen beside it. (Half precision has no room for it: there it is finfo.min.)
_SURELY_OUT = -1e9
# A number that a score is lost in when it is added, in float32 and in float64.
_ABSORBS = -1e24

# Note [Rows without a key]
#
# What a row yields in which every key is shut out depends on how they are:
#   all by -inf                           NaN (SDPA: zero)
#   all filled with one finite number     the mean of V: all scores are the same
#   a low number added                    the same if the scores are lost in it; else as unmasked
#   by several numbers                    the mean over the keys with the greatest of them
# The last, and a number in which scores are not lost, is no meaning that a spec has. There only
# the conditions for -inf become the mask, which hold whatever else does; the finite numbers stay in
# the score as they are written, and a row yields what they make of it.


@dataclass(frozen=True)
class ScoreParts:
    """score is over S, the scaled product; factor multiplies the product beside scale (ONE or not
    a number); row_terms is what was dropped as the same for a whole row. finite: whether keys are
    shut out by a finite number."""

    scale: float
    factor: sympy.Expr
    score: sympy.Expr
    mask: Boolean
    empty_row: EmptyRow
    row_terms: sympy.Expr
    finite: bool = False


@dataclass(frozen=True)
class _Shut:
    """A condition for a key to be attended, and the number by which the others are shut out."""

    keep: Boolean
    value: Any
    added: bool


def score_parts(
    element: sympy.Expr,
    dtype: torch.dtype,
    zero_rows: bool,
    has_key: Callable[[Any], bool] = lambda mask: bool(mask == sympy.true),
) -> ScoreParts:
    """See the module's docstring. dtype is the narrowest that the scores pass through; has_key
    tells whether a mask surely leaves every row a key.

    Raises Refusal where the product is not in the element, or not as a factor that is understood.
    """
    rest, shut = _stripped(element, dtype)
    empty_row = EmptyRow.IMPOSSIBLE
    if not has_key(_kept(shut)):
        if not _is_uniform(shut, dtype):
            _check_sums(shut, dtype, has_key)
            rest, shut = _without_infinities(element, dtype, sympy.false)
            rest = _with_product_outside(rest)
        empty_row = _empty_row(shut, zero_rows)
    finite = any(item.value != -sympy.oo for item in shut)
    mask = _kept(shut)
    if mask.has(RAW):
        raise Refusal("a mask that depends on the scores")
    if rest.has(sympy.oo, -sympy.oo, sympy.nan, sympy.zoo):
        raise Refusal("an infinite number in the scores that is no mask of its own")
    rest, row_terms = without_row_statistics(rest)
    scale, factor, score = _unscaled(rest)
    return ScoreParts(scale, factor, score, mask, empty_row, row_terms, finite)


def _kept(shut: Sequence[_Shut]) -> Boolean:
    return sympy.And(*(item.keep for item in shut))


def _is_uniform(shut: Sequence[_Shut], dtype: torch.dtype) -> bool:
    """Whether a row without a key has one meaning, by Note [Rows without a key]."""
    values = {item.value for item in shut}
    if values <= {-sympy.oo}:
        return True
    if len(values) > 1:
        return False
    if not any(item.added for item in shut):
        return True
    (value,) = values
    lost = value <= _ABSORBS or value <= 0.99 * torch.finfo(dtype).min
    return len(shut) == 1 and bool(lost)


def _check_sums(shut: Sequence[_Shut], dtype: torch.dtype, has_key: Callable[[Any], bool]) -> None:
    """Refuse masks that are -inf together, though not alone, where that may fill a row."""
    finite = [item for item in shut if item.value != -sympy.oo]
    total = sum(item.value for item in finite)
    if total < torch.finfo(dtype).min and not has_key(sympy.Or(*(item.keep for item in finite))):
        raise Refusal("masks whose sum overflows, in rows without a key")


def _empty_row(shut: Sequence[_Shut], zero_rows: bool) -> EmptyRow:
    if not shut:
        return EmptyRow.IMPOSSIBLE
    if any(item.value == -sympy.oo for item in shut):
        return EmptyRow.ZERO if zero_rows else EmptyRow.NAN
    return EmptyRow.UNIFORM


# -- conditions ------------------------------------------------------------------------------------


def _is_out(value: sympy.Expr, dtype: torch.dtype) -> bool:
    """Whether a constant shuts a key out."""
    if value == -sympy.oo:
        return True
    if not value.is_number:
        return False
    return bool(value <= _SURELY_OUT) or bool(value <= 0.99 * torch.finfo(dtype).min)


def _choice(element: Any, dtype: torch.dtype) -> tuple[Boolean, Any, Any] | None:
    """(keep, x, value) for an element that is x where a key is kept and a low number elsewhere."""
    if not isinstance(element, Where):
        return None
    condition, x, y = element.args
    if _is_out(y, dtype):
        return condition, x, y
    return (sympy.Not(condition), y, x) if _is_out(x, dtype) else None


def _stripped(element: sympy.Expr, dtype: torch.dtype) -> tuple[sympy.Expr, list[_Shut]]:
    """The element without the conditions at its outside, and those."""
    choice = _choice(element, dtype)
    if choice is not None:
        keep, x, value = choice
        rest, shut = _stripped(x, dtype)
        return rest, [_Shut(keep, value, added=False), *shut]
    if isinstance(element, sympy.Max):
        return _stripped_maximum(element, dtype)
    if isinstance(element, sympy.Add):
        rests, shut = [], []
        for term in element.args:
            rest, items = _stripped(term, dtype)
            rests.append(rest)
            shut += items if term.has(RAW) else [replace(item, added=True) for item in items]
        return sympy.Add(*rests), shut
    return element, []


def _stripped_maximum(element: sympy.Expr, dtype: torch.dtype) -> tuple[sympy.Expr, list[_Shut]]:
    """max(scores, finfo.min): -inf becomes the minimum, so an empty row is uniform."""
    floors = [arg for arg in element.args if arg.is_number and _is_out(arg, dtype)]
    rest = [arg for arg in element.args if arg not in floors]
    if len(floors) != 1 or len(rest) != 1:
        return element, []
    inner, shut = _stripped(rest[0], dtype)
    return inner, [_Shut(item.keep, floors[0], added=False) for item in shut]


def _without_infinities(
    element: sympy.Expr, dtype: torch.dtype, unless: Boolean
) -> tuple[sympy.Expr, list[_Shut]]:
    """The element without the conditions for -inf, and those.

    unless: where a finite number is filled in from outside, whatever the element is.
    """
    choice = _choice(element, dtype)
    if choice is not None:
        keep, x, value = choice
        if value == -sympy.oo:
            rest, shut = _without_infinities(x, dtype, unless)
            return rest, [_Shut(sympy.Or(keep, unless), value, added=False), *shut]
        rest, shut = _without_infinities(x, dtype, sympy.Or(unless, sympy.Not(keep)))
        return Where(keep, rest, value), shut
    if isinstance(element, sympy.Add):
        parts = [_without_infinities(term, dtype, unless) for term in element.args]
        return sympy.Add(*(rest for rest, _ in parts)), [s for _, items in parts for s in items]
    return element, []


def _with_product_outside(element: sympy.Expr) -> sympy.Expr:
    """`Where(c, S + x, v)` as `S + Where(c, x, v)`, where any score is lost in v."""
    product, rest = _parted(element)
    return element if product is None else product + rest


def _parted(element: sympy.Expr) -> tuple[sympy.Expr | None, sympy.Expr]:
    """(the summand with the product, the rest); (None, _) where they cannot be parted."""
    if isinstance(element, Where):
        condition, x, y = element.args
        if not (y.is_number and y <= _ABSORBS) or condition.has(RAW):
            return None, element
        product, rest = _parted(x)
        return product, Where(condition, rest, y)
    if isinstance(element, sympy.Add):
        having = [term for term in element.args if term.has(RAW)]
        if len(having) != 1:
            return None, element
        product, rest = _parted(having[0])
        return product, sympy.Add(rest, *(term for term in element.args if term not in having))
    return (element, sympy.Integer(0)) if element.has(RAW) else (None, element)


# -- summands and factors --------------------------------------------------------------------------


def without_row_statistics(score: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(the score without summands that are a maximum or log-sum-exp of the row, those)."""
    dropped = [
        term
        for term in sympy.Add.make_args(score)
        if term.has(RowStatistic)
        and all(isinstance(f, RowStatistic) or f.is_number for f in sympy.Mul.make_args(term))
    ]
    rest = sympy.Add(*(term for term in sympy.Add.make_args(score) if term not in dropped))
    if rest.has(RowStatistic):
        raise Refusal("a row's maximum used in an unknown way")
    return rest, sympy.Add(*dropped)


def _unscaled(score: sympy.Expr) -> tuple[float, sympy.Expr, sympy.Expr]:
    """(scale, other factor, score over S)."""
    products = {
        product
        for product in score.atoms(sympy.Mul)
        if RAW in product.args and not _nested(product)
    }
    plain = score.subs({product: sympy.Dummy() for product in products}).has(RAW)
    factors = {sympy.Mul(*(a for a in product.args if a != RAW)) for product in products}
    if plain:
        factors.add(sympy.Integer(1))
    if not score.has(RAW):
        raise Refusal("scores that do not contain the product of Q and K")
    if len(factors) != 1:
        raise Refusal("scores in which the product of Q and K occurs with two factors")
    (whole,) = factors
    number, factor = whole.as_coeff_Mul()
    if number < 0:  # kernels may take the row's maximum before they scale
        number, factor = -number, -factor
    if factor.has(k):
        raise Refusal("scores multiplied by something that depends on the key")
    if not is_exact(factor) or factor.has(Where):
        raise Refusal("scores multiplied by something that is not understood")
    replaced = score.xreplace(dict.fromkeys(products, S)).xreplace({RAW: S})
    return float(number), factor, replaced


def _nested(product: sympy.Expr) -> bool:
    return any(arg.has(RAW) for arg in product.args if arg != RAW)


def depends_on_distance_only(element: Any) -> bool:
    """Whether an expression over q and k is one of k - q."""
    step = sympy.Symbol("step", integer=True)
    moved = element.subs({k: q + step}, simultaneous=True)
    return not sympy.expand(moved).has(q) if not isinstance(moved, Boolean) else not moved.has(q)


def loads_are_thin(element: Any) -> bool:
    """Whether no tensor is read at an index that mentions both q and k."""
    return not any(load.has(q) and load.has(k) for load in element.atoms(Load))
