"""A spec's expressions as torch computations.

`evaluate` walks a sympy expression with Python's operators, so that one walk serves tensors
(positions broadcast against each other), the proxies of a graph being written, and the scalars of
flex_attention's mask_mod and score_mod.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx

from adaattn_compiler.spec import POSITIONS, AttentionSpec, EmptyRow, Load, M, N, Where, param

LoadFunction = Callable[[int, tuple[sympy.Expr, ...]], Any]


def evaluate(expression: Any, values: Mapping[sympy.Symbol, Any], load: LoadFunction) -> Any:
    """The value of an expression; load(i, index) gives the elements of operand i.

    Raises NotImplementedError for a function that has no torch form here.
    """

    def value(e: Any) -> Any:
        return evaluate(e, values, load)

    if expression in (sympy.true, sympy.false):
        return bool(expression)
    if expression.is_Symbol:
        return values[expression]
    if expression.is_number:
        return int(expression) if expression.is_Integer else float(expression)
    if isinstance(expression, Load):
        return load(int(expression.args[0]), expression.args[1:])
    if isinstance(expression, Where):
        condition, x, y = (value(arg) for arg in expression.args)
        if isinstance(condition, bool):
            return x if condition else y
        if any(_is_beyond_float32(number) for number in (x, y)):
            x, y = (_in_float64(number, condition) for number in (x, y))
        return torch.where(condition, x, y)
    if isinstance(expression, sympy.floor):
        numerator, denominator = expression.args[0].as_numer_denom()
        return value(numerator) // value(denominator)
    if isinstance(expression, Relational):
        return _RELATIONS[type(expression)](value(expression.lhs), value(expression.rhs))
    if isinstance(expression, sympy.Pow):
        return _power(expression, value)
    function = _FUNCTIONS.get(expression.func)
    if function is None:
        raise NotImplementedError(f"no torch form of {expression.func}")
    return function(*(value(arg) for arg in _ordered(expression)))


def _is_beyond_float32(number: Any) -> bool:
    """Whether it is a number that torch.where would not take (it makes numbers float32)."""
    largest = torch.finfo(torch.float32).max
    return isinstance(number, (int, float)) and largest < abs(number) < float("inf")


def _in_float64(number: Any, like: Any) -> Any:
    return (
        torch.full_like(like, number, dtype=torch.float64)
        if isinstance(number, (int, float))
        else number
    )


def _ordered(expression: Any) -> Sequence[Any]:
    """Arguments with tensors first, so that an operator never starts from two numbers."""
    return (
        sorted(expression.args, key=lambda arg: (arg.is_number, str(arg)))
        if (isinstance(expression, (sympy.Add, sympy.Mul, sympy.Max, sympy.Min)))
        else expression.args
    )


def _power(expression: Any, value: Callable[[Any], Any]) -> Any:
    base, exponent = expression.as_base_exp()
    if exponent == -1:
        return 1 / value(base)
    if exponent.is_Integer and 1 < exponent <= 4:
        return functools.reduce(operator.mul, [value(base)] * int(exponent))
    raise NotImplementedError(f"no torch form of {expression}")


def _folded(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *arguments: functools.reduce(function, arguments)


def _extreme(tensor_form: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def both(x: Any, y: Any) -> Any:
        if isinstance(x, (int, float)):
            x, y = y, x
        if isinstance(x, (int, float)):
            return max(x, y) if tensor_form is torch.maximum else min(x, y)
        if isinstance(y, (int, float)):
            return x.clamp(min=y) if tensor_form is torch.maximum else x.clamp(max=y)
        return tensor_form(x, y)

    return both


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.Add: _folded(operator.add),
    sympy.Mul: _folded(operator.mul),
    sympy.Mod: operator.mod,
    sympy.Abs: lambda x: abs(x),
    sympy.And: _folded(operator.and_),
    sympy.Or: _folded(operator.or_),
    sympy.Not: lambda x: ~x,
    sympy.tanh: lambda x: torch.tanh(x),
    sympy.Max: _folded(_extreme(torch.maximum)),
    sympy.Min: _folded(_extreme(torch.minimum)),
}

_RELATIONS: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
}


def is_printable(expression: Any) -> bool:
    """Whether `evaluate` has a form for every part of an expression."""
    if expression in (sympy.true, sympy.false) or expression.is_Symbol or expression.is_number:
        return True
    known = (Load, Where, sympy.floor, Relational)
    if isinstance(expression, sympy.Pow):
        return expression.exp == -1 or bool(
            expression.exp.is_Integer and 1 < expression.exp <= 4 and is_printable(expression.base)
        )
    if not isinstance(expression, known) and expression.func not in _FUNCTIONS:
        return False
    return all(is_printable(arg) for arg in expression.args)


# -- whole tensors ---------------------------------------------------------------------------------


def arange(size: Any, like: Any) -> Any:
    """0, 1, ... on the device of `like`; a node of its graph where `like` is a proxy."""
    if isinstance(like, fx.Proxy):
        device = like.node.meta["example_value"].device
        return like.tracer.create_proxy("call_function", torch.arange, (size,), {"device": device})
    return torch.arange(size, device=like.device)


def positions(
    expressions: Sequence[Any], like: Any, sizes: Sequence[Any]
) -> dict[sympy.Symbol, Any]:
    """Index tensors of the positions that expressions mention, and M and N.

    Shapes [B,1,1,1], [H,1,1], [M,1] and [N]; sizes are B, H, M, N.
    """
    mentioned = {symbol for e in expressions if e is not None for symbol in e.free_symbols}
    values: dict[sympy.Symbol, Any] = {M: sizes[2], N: sizes[3]}
    for place, (symbol, size) in enumerate(zip(POSITIONS, sizes, strict=True)):
        if symbol in mentioned:
            trailing = (1,) * (3 - place)
            index = arange(size, like)
            values[symbol] = index.reshape(-1, *trailing) if trailing else index
    return values


def rank_of(expression: Any) -> int:
    """The number of axes of an expression evaluated densely: the first that it mentions and on."""
    places = [place for place, symbol in enumerate(POSITIONS) if expression.has(symbol)]
    return 4 - min(places, default=4)


def evaluate_dense(
    expression: Any,
    values: Mapping[sympy.Symbol, Any],
    operands: Sequence[Any],
    params: Sequence[Any] = (),
    *,
    partial: bool = False,
) -> Any:
    """An expression over the four positions as a tensor that broadcasts to [B,H,M,N].

    Only the axes that the expression mentions are larger than 1. partial: the index tensors hold
    some positions only, so operands are read at them instead of along whole axes.
    """
    whole = {**values, **{param(i): value for i, value in enumerate(params)}}

    def load(number: int, index: tuple[sympy.Expr, ...]) -> Any:
        operand = operands[number]
        if not partial and _is_plain(index):
            return _broadcast(operand, index)
        places = [evaluate(e, whole, load) for e in index]
        return operand[tuple(places)]

    return evaluate(expression, whole, load)


def _is_plain(index: Sequence[sympy.Expr]) -> bool:
    """Whether an index is distinct positions in the order b, h, q, k, and zeros."""
    order = [POSITIONS.index(i) for i in index if i in POSITIONS]
    return order == sorted(set(order)) and all(i in POSITIONS or i == 0 for i in index)


def _broadcast(operand: Any, index: Sequence[sympy.Expr]) -> Any:
    """An operand read at plain positions, as a tensor whose axes are aligned with [B,H,M,N]."""
    kept = [i for i in index if i in POSITIONS]
    view = operand[tuple(slice(None) if i in POSITIONS else 0 for i in index)]
    if not kept:
        return view
    first = POSITIONS.index(kept[0])
    axes = POSITIONS[first:]
    return view[tuple(slice(None) if axis in kept else None for axis in axes)]


def has_key(
    spec: AttentionSpec,
    values: Mapping[sympy.Symbol, Any],
    operands: Sequence[Any],
    params: Sequence[Any] = (),
    *,
    partial: bool = False,
) -> Any:
    """Whether each row has a key that neither the mask nor a bias of -inf shuts out, keepdim."""
    keep = evaluate_dense(spec.mask, values, operands, params, partial=partial)
    if spec.bias is not None and spec.bias.has(Load) and spec.empty_row is not EmptyRow.UNIFORM:
        bias = evaluate_dense(spec.bias, values, operands, params, partial=partial)
        keep = (bias > float("-inf")) & torch.as_tensor(keep)
    return torch.as_tensor(keep).any(-1, keepdim=True)


def dense_bias(
    spec: AttentionSpec,
    values: Mapping[sympy.Symbol, Any],
    operands: Sequence[Any],
    params: Sequence[Any] = (),
) -> Any:
    """What a spec adds to the scaled product (without its mask); None where it adds nothing."""
    bias = spec.bias
    if bias is None:
        raise NotImplementedError("a score that is not a sum with the product")
    return None if bias == 0 else evaluate_dense(bias, values, operands, params)
