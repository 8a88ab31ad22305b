"""From the expression of a score to scale, score and mask.

`score_parts` takes the element of a softmax's argument, in which one symbol stands for the raw
product q . k, and parts it: conditions that shut a key out become the mask, the numeric factor of
the product becomes the scale, values that are the same for a whole row are dropped (softmax does
not see them), the rest is the score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from adaattn_compiler.passes.element import RowStatistic, is_exact
from adaattn_compiler.spec import EmptyRow, Load, Refusal, S, Where, k, q

RAW = sympy.Symbol("q_dot_k", real=True)

# A finite fill at or below this shuts a key out as surely as -inf: a score would have to be of this
# size to be seen beside it. (Half precision has no room for it: there it is finfo.min.)
_SURELY_OUT = -1e9


@dataclass(frozen=True)
class ScoreParts:
    """score is over S, the scaled product; factor multiplies the product beside scale (ONE or not
    a number)."""

    scale: float
    factor: sympy.Expr
    score: sympy.Expr
    mask: Boolean
    empty_row: EmptyRow


@dataclass(frozen=True)
class _Hard:
    """A condition for a key to be attended, and how the others are shut out."""

    keep: Boolean
    value: Any
    added: bool


def score_parts(element: sympy.Expr, dtype: torch.dtype, zero_rows: bool) -> ScoreParts:
    """See the module's docstring. dtype is that of the softmax's argument.

    Raises Refusal where the product is not in the element, or not as a factor that is understood.
    """
    soft, hard = _stripped(element, dtype)
    if len({item.added for item in hard}) > 1 and len(hard) > 1:
        hard, soft = _only_infinite(element, dtype)
    elif sum(item.added for item in hard) > 1 and any(item.value != -sympy.oo for item in hard):
        # Two finite minima added are -inf in float32: rows with no key would change their meaning.
        hard, soft = _only_infinite(element, dtype)
    soft = without_row_statistics(soft)
    scale, factor, score = _unscaled(soft)
    mask = sympy.And(*(item.keep for item in hard))
    return ScoreParts(scale, factor, score, mask, _empty_row(hard, zero_rows))


def _empty_row(hard: list[_Hard], zero_rows: bool) -> EmptyRow:
    if not hard:
        return EmptyRow.IMPOSSIBLE
    if any(item.value == -sympy.oo for item in hard):
        return EmptyRow.ZERO if zero_rows else EmptyRow.NAN
    return EmptyRow.UNIFORM


def _is_out(value: sympy.Expr, dtype: torch.dtype) -> bool:
    """Whether a constant shuts a key out."""
    if value == -sympy.oo:
        return True
    if not value.is_number:
        return False
    return bool(value <= _SURELY_OUT) or bool(value <= 0.99 * torch.finfo(dtype).min)


def _stripped(element: sympy.Expr, dtype: torch.dtype) -> tuple[sympy.Expr, list[_Hard]]:
    """The element without the conditions at its outside, and those."""
    if isinstance(element, Where):
        condition, x, y = element.args
        if _is_out(y, dtype):
            rest, hard = _stripped(x, dtype)
            return rest, [_Hard(condition, y, added=False), *hard]
        if _is_out(x, dtype):
            rest, hard = _stripped(y, dtype)
            return rest, [_Hard(sympy.Not(condition), x, added=False), *hard]
        return element, []
    if isinstance(element, sympy.Max):
        return _stripped_maximum(element, dtype)
    if isinstance(element, sympy.Add):
        rest, hard = [], []
        for term in element.args:
            left, keeps = _stripped_term(term, dtype)
            rest.append(left)
            hard += keeps
        return sympy.Add(*rest), hard
    return element, []


def _stripped_term(term: sympy.Expr, dtype: torch.dtype) -> tuple[sympy.Expr, list[_Hard]]:
    """A summand `Where(c, x, -inf)` as x and the condition c."""
    if isinstance(term, Where) and not term.has(RAW):
        condition, x, y = term.args
        if _is_out(y, dtype):
            rest, hard = _stripped_term(x, dtype)
            return rest, [_Hard(condition, y, added=True), *hard]
        if _is_out(x, dtype):
            rest, hard = _stripped_term(y, dtype)
            return rest, [_Hard(sympy.Not(condition), x, added=True), *hard]
    return term, []


def _stripped_maximum(element: sympy.Expr, dtype: torch.dtype) -> tuple[sympy.Expr, list[_Hard]]:
    """max(scores, finfo.min): -inf becomes the minimum, so an empty row is uniform."""
    floors = [arg for arg in element.args if arg.is_number and _is_out(arg, dtype)]
    rest = [arg for arg in element.args if arg not in floors]
    if not floors or len(rest) != 1:
        return element, []
    inner, hard = _stripped(rest[0], dtype)
    return inner, [_Hard(item.keep, floors[0], item.added) for item in hard]


def _only_infinite(element: sympy.Expr, dtype: torch.dtype) -> tuple[list[_Hard], sympy.Expr]:
    """No condition taken out: the masks stay in the score as they are written."""
    return [], element


def without_row_statistics(score: sympy.Expr) -> sympy.Expr:
    """Without summands that are a maximum or log-sum-exp of the row."""
    kept = [
        term
        for term in sympy.Add.make_args(score)
        if not (
            term.has(RowStatistic)
            and all(isinstance(f, RowStatistic) or f.is_number for f in sympy.Mul.make_args(term))
        )
    ]
    score = sympy.Add(*kept)
    if score.has(RowStatistic):
        raise Refusal("a row's maximum used in an unknown way")
    return score


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
