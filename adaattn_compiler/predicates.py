"""Masks as predicates: one normal form, their names, and what holds for every position.

A predicate is a sympy Boolean over b, h, q, k (and M, N, run-time integers and loads). In normal
form every comparison of integers is `expression >= 0`, `expression == 0` or `!= 0`.
"""

from __future__ import annotations

from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, BooleanFunction, Not, Or

from adaattn_compiler.spec import POSITIONS, Load, M, N, Where, b, h, k, q


def normalized(predicate: Any) -> Any:
    """The predicate in normal form."""
    if predicate in (sympy.true, sympy.false, True, False):
        return sympy.sympify(predicate)
    if isinstance(predicate, (And, Or)):
        return predicate.func(*(normalized(arg) for arg in predicate.args))
    if isinstance(predicate, Not):
        return normalized(_negated(predicate.args[0]))
    if isinstance(predicate, Relational):
        return _normalized_comparison(predicate)
    if isinstance(predicate, BooleanFunction):
        return normalized(sympy.to_nnf(predicate, simplify=False))
    return predicate


def _negated(predicate: Any) -> Any:
    if isinstance(predicate, And):
        return Or(*(Not(arg) for arg in predicate.args))
    if isinstance(predicate, Or):
        return And(*(Not(arg) for arg in predicate.args))
    if isinstance(predicate, Relational):
        return predicate.negated
    if isinstance(predicate, BooleanFunction):
        return sympy.to_nnf(Not(predicate), simplify=False)
    return Not(predicate)


def _normalized_comparison(relation: Relational) -> Any:
    left, right = relation.lhs, relation.rhs
    if left.has(Where) or right.has(Where):
        return _unfolded(relation)
    if not (left.is_integer and right.is_integer):
        return relation
    difference = sympy.expand(left - right)
    if isinstance(relation, sympy.Ge):
        return sympy.Ge(difference, 0)
    if isinstance(relation, sympy.Gt):
        return sympy.Ge(difference - 1, 0)
    if isinstance(relation, sympy.Le):
        return sympy.Ge(sympy.expand(-difference), 0)
    if isinstance(relation, sympy.Lt):
        return sympy.Ge(sympy.expand(-difference) - 1, 0)
    if difference.could_extract_minus_sign():
        difference = sympy.expand(-difference)
    return relation.func(difference, 0)


def _unfolded(relation: Relational) -> Any:
    """A comparison with a conditional value, as conditions and plain comparisons."""
    where = next(iter(relation.atoms(Where)))
    condition, x, y = where.args
    return normalized(
        Or(
            And(condition, relation.xreplace({where: x})),
            And(Not(condition), relation.xreplace({where: y})),
        )
    )


def lower_bound(expression: sympy.Expr) -> sympy.Expr | None:
    """A lower bound over all positions of an expression that is linear in them; else None."""
    bound = sympy.expand(expression)
    for position, size in ((q, M), (k, N)):
        slope = bound.coeff(position, 1)
        rest = sympy.expand(bound - slope * position)
        if rest.has(position) or slope.has(*POSITIONS):
            return None
        if slope.is_nonnegative:
            bound = rest
        elif slope.is_nonpositive:
            bound = sympy.expand(rest + slope * (size - 1))
        else:
            return None
    return bound


def simplified(predicate: Any, facts: dict[Any, Any] | None = None) -> Any:
    """The normal form without comparisons that hold (or fail) at every position.

    facts: values of M and N where they are known.
    """
    if isinstance(predicate, (And, Or)):
        return predicate.func(*(simplified(arg, facts) for arg in predicate.args))
    if isinstance(predicate, sympy.Ge):
        known = facts or {}
        low = lower_bound(predicate.lhs)
        if low is not None and low.subs(known).is_nonnegative:
            return sympy.true
        high = lower_bound(-predicate.lhs)
        if high is not None and high.subs(known).is_positive:
            return sympy.false
    return predicate


def has_key_in_every_row(mask: Any, facts: dict[Any, Any] | None = None) -> bool:
    """Whether some key is provably attended in every row: the first, the last or the diagonal."""
    if mask == sympy.true:
        return True
    known = facts or {}
    candidates = (q, q + (N - M), sympy.Integer(0), N - 1)
    for candidate in candidates:
        offset = lower_bound(candidate)
        inside = offset is not None and offset.subs(known).is_nonnegative
        room = lower_bound(N - 1 - candidate)
        if not inside or room is None or not room.subs(known).is_nonnegative:
            continue
        if simplified(normalized(mask.subs(k, candidate)), facts) == sympy.true:
            return True
    return False


# -- names -----------------------------------------------------------------------------------------


def describe(mask: Any) -> str:
    """A mask in the words of the field: `causal & window(512)`, `key padding`, ..."""
    if mask == sympy.true:
        return "none"
    if mask == sympy.false:
        return "all masked"
    if isinstance(mask, And):
        names = sorted((describe(arg) for arg in mask.args), key=_rank)
        return " & ".join(f"({name})" if " | " in name else name for name in names)
    if isinstance(mask, Or):
        return " | ".join(sorted((describe(arg) for arg in mask.args), key=_rank))
    return _atom(mask)


def _rank(name: str) -> tuple[int, str]:
    order = ("causal", "window", "prefix", "chunk", "dilated", "segment", "key padding")
    return next((i for i, word in enumerate(order) if name.startswith(word)), len(order)), name


def _atom(mask: Boolean) -> str:
    if isinstance(mask, (sympy.Ge, sympy.Eq, sympy.Ne)) and mask.rhs == 0:
        named = _comparison(mask)
        if named is not None:
            return named
    return str(mask)


def _comparison(mask: Any) -> str | None:
    difference = mask.lhs
    if isinstance(mask, sympy.Ge):
        return _inequality(difference)
    if isinstance(mask, sympy.Eq):
        return _equality(difference)
    if isinstance(difference, Load):
        return _load_name(difference)
    return None


def _inequality(difference: sympy.Expr) -> str | None:
    rest = sympy.expand(difference - (q - k))
    if not rest.has(*POSITIONS):
        return "causal" if rest == 0 else f"causal({_signed(rest)})"
    rest = sympy.expand(difference - (k - q))
    if not rest.has(*POSITIONS):
        return f"window({rest + 1})"
    rest = sympy.expand(difference + k)
    if not rest.has(*POSITIONS):
        return f"key padding({rest + 1})" if rest.has(Load) else f"prefix({rest + 1})"
    return None


def _signed(offset: sympy.Expr) -> str:
    text = str(offset)
    return text if text.startswith("-") else f"+{text}"


def _equality(difference: sympy.Expr) -> str | None:
    if isinstance(difference, sympy.Mod) and difference.args[0] in (q - k, k - q):
        return f"dilated({difference.args[1]})"
    floors = list(difference.atoms(sympy.floor))
    if len(floors) == 2 and difference.subs(k, q) == 0:
        size = sympy.simplify(q / next(f for f in floors if f.has(q)).args[0])
        return f"chunk({size})" if size.is_number else "chunk"
    loads = list(difference.atoms(Load))
    if len(loads) == 2 and difference.subs(k, q) == 0:
        return f"segment({loads[0].args[0]})"
    return None


def _load_name(load: Load) -> str:
    index = load.args[1:]
    if k in index and q not in index and h not in index:
        return "key padding"
    axes = "".join(str(i) for i in index if i in (b, h, q, k))
    return f"tensor[{axes}]"
