"""Masks as predicates: one normal form, their names, and what holds for every position.

A predicate is a sympy Boolean over b, h, q, k (and M, N, run-time integers and loads). In normal
form every comparison of integers is `expression >= 0`, `expression == 0` or `!= 0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, BooleanFunction, Not, Or

from adaattn_compiler.spec import POSITIONS, Load, M, N, Where, h, k, q


def normalized(predicate: Any) -> Any:
    """The predicate in normal form: And and Or of comparisons."""
    predicate = sympy.sympify(predicate)
    if predicate in (sympy.true, sympy.false):
        return predicate
    if isinstance(predicate, (And, Or)):
        return predicate.func(*(normalized(arg) for arg in predicate.args))
    if isinstance(predicate, Not):
        inner = predicate.args[0]
        return normalized(_negated(inner)) if _is_negatable(inner) else predicate
    if isinstance(predicate, Relational):
        return _normalized_comparison(predicate)
    if isinstance(predicate, BooleanFunction):
        return normalized(sympy.to_nnf(predicate, simplify=False))
    return predicate


def _is_negatable(predicate: Any) -> bool:
    return isinstance(predicate, (BooleanFunction, Relational))


def _negated(predicate: Any) -> Any:
    if isinstance(predicate, And):
        return Or(*(Not(arg) for arg in predicate.args))
    if isinstance(predicate, Or):
        return And(*(Not(arg) for arg in predicate.args))
    if isinstance(predicate, Relational):
        return predicate.negated
    return sympy.to_nnf(Not(predicate), simplify=False)


def _normalized_comparison(relation: Relational) -> Any:
    where = _first_choice(relation)
    if where is not None:
        return _unfolded(relation, where)
    left, right = relation.lhs, relation.rhs
    symmetric = isinstance(relation, (sympy.Eq, sympy.Ne))
    if not (left.is_integer and right.is_integer):
        # Of two values that are known only at run time the order of an equality is free.
        return relation.func(*sorted((left, right), key=_order)) if symmetric else relation
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


def _order(expression: sympy.Expr) -> tuple[bool, str]:
    """Numbers last, the rest by name: the same in every process."""
    return bool(expression.is_number), str(expression)


def _first_choice(expression: Any) -> Where | None:
    """The outermost conditional value, none inside the index of a load.

    Such an index may not be parted: `x[where(i < 0, i + n, i)]` would become two loads, each at
    places that the tensor does not have.
    """
    if isinstance(expression, Load):
        return None
    if isinstance(expression, Where):
        return expression
    found = (_first_choice(arg) for arg in expression.args)
    return next((where for where in found if where is not None), None)


def _unfolded(relation: Relational, where: Where) -> Any:
    """A comparison with a conditional value, as conditions and plain comparisons."""
    condition, x, y = where.args
    return normalized(
        Or(
            And(condition, _replaced(relation, where, x)),
            And(Not(condition), _replaced(relation, where, y)),
        )
    )


def _replaced(expression: Any, where: Where, value: Any) -> Any:
    """An expression with a conditional value replaced, but not in the index of a load."""
    if expression == where:
        return value
    if isinstance(expression, Load) or not expression.args:
        return expression
    return expression.func(*(_replaced(arg, where, value) for arg in expression.args))


def lower_bound(expression: sympy.Expr) -> sympy.Expr | None:
    """A lower bound over all positions of an expression that is linear in them; else None."""
    bound = sympy.expand(expression)
    if bound.has(Load):
        return None
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


def simplified(predicate: Any, facts: Mapping[Any, Any] | None = None) -> Any:
    """The predicate without comparisons that hold (or fail) at every position.

    facts: values of M and N where they are known.
    """
    if isinstance(predicate, (And, Or)):
        return predicate.func(*(simplified(arg, facts) for arg in predicate.args))
    if not isinstance(predicate, Relational):
        return predicate
    known = facts or {}
    least = _bound(predicate.lhs - predicate.rhs, known)
    most = _bound(predicate.rhs - predicate.lhs, known)  # least of the negative
    if isinstance(predicate, sympy.Ge):
        return _decided(least.is_nonnegative, most.is_positive, predicate)
    if isinstance(predicate, sympy.Gt):
        return _decided(least.is_positive, most.is_nonnegative, predicate)
    if isinstance(predicate, sympy.Le):
        return _decided(most.is_nonnegative, least.is_positive, predicate)
    if isinstance(predicate, sympy.Lt):
        return _decided(most.is_positive, least.is_nonnegative, predicate)
    apart = least.is_positive or most.is_positive
    if isinstance(predicate, sympy.Eq):
        return _decided(False, apart, predicate)
    return _decided(apart, False, predicate)


def _bound(expression: sympy.Expr, known: Mapping[Any, Any]) -> sympy.Expr:
    """The lower bound with known sizes, or minus infinity."""
    bound = lower_bound(expression)
    return -sympy.oo if bound is None else bound.subs(known)


def _decided(holds: bool | None, fails: bool | None, predicate: Any) -> Any:
    return sympy.true if holds else sympy.false if fails else predicate


def has_key_in_every_row(mask: Any, facts: Mapping[Any, Any] | None = None) -> bool:
    """Whether some key is provably attended in every row: the first, the last or a diagonal.

    A proof: where it says yes, no kernel looks for rows without keys.
    """
    known = facts or {}
    for candidate in (q, q + (N - M), sympy.Integer(0), N - 1):
        inside = _bound(candidate, known).is_nonnegative
        if not inside or not _bound(N - 1 - candidate, known).is_nonnegative:
            continue
        column = candidate.subs(known)
        attended = sympy.sympify(mask).subs(known).subs(k, column)
        if simplified(normalized(attended), facts) == sympy.true:
            return True
    return False


# -- names -----------------------------------------------------------------------------------------


def describe(mask: Any) -> str:
    """A mask in the words of the field: `causal & window(512)`, `key padding`, ..."""
    mask = normalized(mask)
    if mask == sympy.true:
        return "none"
    if mask == sympy.false:
        return "all masked"
    return _named(mask)


def _named(mask: Any) -> str:
    if isinstance(mask, And):
        names = sorted({_named(arg) for arg in mask.args}, key=_rank)
        return " & ".join(f"({name})" if " | " in name else name for name in names)
    if isinstance(mask, Or):
        return " | ".join(sorted({_named(arg) for arg in mask.args}, key=_rank))
    name = None
    if isinstance(mask, Relational):
        name = _data_name(mask) if mask.has(Load) else _comparison(mask)
    return str(mask) if name is None else name


def _rank(name: str) -> tuple[int, str]:
    order = ("causal", "window", "prefix", "chunk", "dilated", "segment", "key padding")
    return next((i for i, word in enumerate(order) if name.startswith(word)), len(order)), name


def _comparison(mask: Relational) -> str | None:
    """The name of a comparison without data, in normal form."""
    difference = sympy.expand(mask.lhs - mask.rhs)
    if isinstance(mask, sympy.Ge):
        return _inequality(difference)
    name = _equality(difference)
    if isinstance(mask, sympy.Eq) or name is None:
        return name if isinstance(mask, sympy.Eq) else None
    return f"not {name}" if isinstance(mask, sympy.Ne) else None


def _inequality(difference: sympy.Expr) -> str | None:
    """The name of `difference >= 0`."""
    rest = _without(difference, q - k)
    if rest is not None:
        return "causal" if rest == 0 else f"causal({_signed(rest)})"
    rest = _without(difference, k - q)
    if rest is not None:
        return f"after({-rest})" if rest.is_negative else f"window({rest + 1})"
    rest = _without(difference, -k)
    if rest is not None:
        return f"prefix({rest + 1})"
    for distance in (sympy.Abs(q - k), sympy.Abs(k - q)):
        rest = _without(difference, -distance)
        if rest is not None:
            return f"window(±{rest})"
    for position in (k, q):
        rest = _without(difference, position)
        if rest is not None:
            return f"{position} >= {-rest}"
        rest = _without(difference, -position)
        if rest is not None:
            return f"{position} <= {rest}"
    return None


def _without(difference: sympy.Expr, part: sympy.Expr) -> sympy.Expr | None:
    """What is left of a sum without a part, where no position is left."""
    rest = sympy.expand(difference - part)
    return None if rest.has(*POSITIONS) else rest


def _signed(offset: sympy.Expr) -> str:
    text = str(offset)
    return text if text.startswith("-") else f"+{text}"


def _equality(difference: sympy.Expr) -> str | None:
    """The name of `difference == 0`."""
    if isinstance(difference, sympy.Mod):
        dividend, divisor = difference.args
        for offset in (_without(dividend, q - k), _without(dividend, k - q)):
            if offset is not None:
                return f"dilated({divisor}{'' if offset == 0 else ', ' + _signed(offset)})"
    if difference in (q - k, k - q):
        return "diagonal"
    return _chunk_name(difference)


def _chunk_name(difference: sympy.Expr) -> str | None:
    """`floor((q + offset) / size) == floor(k / size)`."""
    floors = sorted(difference.atoms(sympy.floor), key=str)
    rows = [f.args[0] for f in floors if f.has(q) and not f.has(k)]
    columns = [f.args[0] for f in floors if f.has(k) and not f.has(q)]
    if len(rows) != 1 or len(columns) != 1:
        return None
    step = sympy.floor(rows[0]) - sympy.floor(columns[0])
    if difference not in (step, -step):
        return None
    slope = rows[0].coeff(q, 1)
    offset = sympy.expand(rows[0] - columns[0].subs(k, q))
    if slope == 0 or offset.has(*POSITIONS) or columns[0].has(*(p for p in POSITIONS if p != k)):
        return None
    size, offset = sympy.cancel(1 / slope), sympy.cancel(offset / slope)
    return f"chunk({size}{'' if offset == 0 else ', ' + _signed(offset)})"


def _data_name(mask: Relational) -> str | None:
    """The name of a comparison that reads tensors."""
    axes = [axis for axis in POSITIONS if mask.has(axis)]
    equal = isinstance(mask, sympy.Eq)
    if k in axes and q not in axes and h not in axes:
        return "key padding"
    loads = sorted(mask.atoms(Load), key=str)
    if isinstance(mask, (sympy.Eq, sympy.Ne)):
        sign = "" if equal else "not "
        if set(mask.args) == set(loads) and len(loads) == 2:
            (row, column) = loads if loads[0].has(q) else reversed(loads)
            if row.has(q) and not row.has(k) and column.has(k) and not column.has(q):
                tensors = dict.fromkeys(str(load.args[0]) for load in (row, column))
                return f"{sign}segment({', '.join(tensors)})"
        if len(loads) == 1 and set(mask.args) == {loads[0], sympy.Integer(0)}:
            sign = "not " if equal else ""
            return f"{sign}tensor[{''.join(str(axis) for axis in axes)}]"
    return None
