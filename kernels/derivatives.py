"""Derivatives of a spec's expressions, by the rules of calculus for what specs hold."""

from __future__ import annotations

from typing import Any

import sympy

from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.spec import AttentionSpec, Load, Where


def derivative(expression: Any, by: Any) -> Any:
    """d expression / d by, where `by` is a symbol or a Load. NoCode where no rule is known."""
    if expression == by:
        return sympy.Integer(1)
    if not expression.has(by):
        return sympy.Integer(0)
    rule = _RULES.get(expression.func)
    if rule is None:
        raise NoCode(f"no derivative of {expression.func.__name__}")
    return rule(expression, by)


def _of_sum(expression: Any, by: Any) -> Any:
    return sympy.Add(*(derivative(arg, by) for arg in expression.args))


def _of_product(expression: Any, by: Any) -> Any:
    parts = []
    for i, arg in enumerate(expression.args):
        rest = (*expression.args[:i], *expression.args[i + 1 :])
        parts.append(sympy.Mul(derivative(arg, by), *rest))
    return sympy.Add(*parts)


def _of_power(expression: Any, by: Any) -> Any:
    base, exponent = expression.as_base_exp()
    if not exponent.is_Integer:
        raise NoCode(f"no derivative of {expression}")
    return exponent * base ** (exponent - 1) * derivative(base, by)


def _of_tanh(expression: Any, by: Any) -> Any:
    return (1 - expression**2) * derivative(expression.args[0], by)


def _of_where(expression: Any, by: Any) -> Any:
    condition, x, y = expression.args
    if condition.has(by):
        raise NoCode(f"no derivative of {expression}")
    return Where(condition, derivative(x, by), derivative(y, by))


def _of_load(expression: Any, by: Any) -> Any:
    raise NoCode(f"no derivative by what is in the index of {expression}")


_RULES = {
    sympy.Add: _of_sum,
    sympy.Mul: _of_product,
    sympy.Pow: _of_power,
    sympy.tanh: _of_tanh,
    Where: _of_where,
    Load: _of_load,
}


def conditional_loads(expression: Any, inside: bool = False) -> set[Load]:
    """The loads that only count under some condition: elsewhere their places may not exist."""
    if isinstance(expression, Load):
        return {expression} if inside else set()
    within = inside or isinstance(expression, Where)
    return {load for arg in expression.args for load in conditional_loads(arg, within)}


def float_loads(spec: AttentionSpec, expression: Any) -> list[Load]:
    """What an expression reads of float operands, as values (not as places to read at)."""
    if expression is None:
        return []
    loads = (load for load in expression.atoms(Load) if _is_float(spec, load))
    return sorted((load for load in loads if derivative(expression, load) != 0), key=str)


def _is_float(spec: AttentionSpec, load: Load) -> bool:
    return spec.operands[int(load.args[0])].kind == "float"
