"""Numbers that are known only at run time become operands: tensors without axes.

Under `dynamic=True` a Python float (a scale, a softcap, a slope) is a symbol. Kernels take integers
and tensors only, and torch's own tensors of a symbolic float cost a guard on its value wherever
they are not arithmetic (Note [Numbers in the graph], emit.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from adaattn_compiler.kernels.evaluate import is_printable
from adaattn_compiler.passes.expressions import is_condition
from adaattn_compiler.passes.site import Site
from adaattn_compiler.spec import EmptyRow, Load, OperandSpec, S, param


def with_numbers_as_operands(site: Site) -> Site:
    """The site with every run-time number that is no integer as an operand after its others."""
    whole = tuple(value for value in site.params if value.is_integer)
    if len(whole) == len(site.params):
        return site
    names = {
        param(i): param(whole.index(value)) if value.is_integer else value
        for i, value in enumerate(site.params)
    }
    numbers = _Numbers(frozenset(site.params) - frozenset(whole), len(site.spec.operands))

    def moved(expression: Any) -> Any:
        return None if expression is None else numbers.loaded(expression.xreplace(names))

    sink, factor = moved(site.spec.sink), moved(site.scale_factor)
    score, factor = _with_factor(moved(site.spec.score), factor, sink, numbers)
    spec = replace(
        site.spec,
        score=score,
        mask=moved(site.spec.mask),
        sink=sink,
        empty_row=_empty_row(site) if numbers.are_in(score) else site.spec.empty_row,
    )
    operands = (*spec.operands, *(OperandSpec("float", 0) for _ in numbers.found))
    return replace(
        site,
        spec=replace(spec, operands=operands, params=len(whole)),
        params=whole,
        scale_factor=factor,
        numbers=tuple(numbers.found),
        readings=(),  # proven by now, and of the numbers by their symbols
    )


def _with_factor(
    score: sympy.Expr, factor: Any, sink: Any, numbers: _Numbers
) -> tuple[sympy.Expr, Any]:
    """(score, what Q is multiplied by): numbers go into the score where Q must not have them.

    An infinite number (a softcap of 0 divides by it) makes infinite scores, of infinite queries
    NaN. That is the same where the weights of such a row are NaN anyway, as they are unless the
    scores pass through a function or stand beside a sink.
    """
    if factor is None or (sink is None and not (score - S).has(S)):
        return score, factor
    parts = sympy.Mul.make_args(factor)
    given = sympy.Mul(*(part for part in parts if numbers.are_in(part)))
    rest = sympy.Mul(*(part for part in parts if not numbers.are_in(part)))
    return score.xreplace({S: given * S}), None if rest == 1 else rest


def _empty_row(site: Site) -> EmptyRow:
    """What a row yields whose scores a number makes -inf throughout: as for a bias in a tensor."""
    spec = site.spec
    if spec.empty_row is not EmptyRow.IMPOSSIBLE:
        return spec.empty_row
    return EmptyRow.ZERO if spec.sink is not None or site.spelling == "sdpa" else EmptyRow.NAN


@dataclass
class _Numbers:
    """The numbers of one site over these symbols, each once; the first is operand `first`."""

    symbols: frozenset[sympy.Symbol]
    first: int
    found: list[sympy.Expr] = field(default_factory=list)

    def are_in(self, expression: Any) -> bool:
        """Whether an expression reads one of them."""
        return any(load.args[0] >= self.first for load in expression.atoms(Load))

    def loaded(self, expression: Any) -> Any:
        """The expression with the largest parts that are numbers as loads.

        Largest, because a number is computed in float64, as Python has it, and rounded once: p / c
        may be of ordinary size where p and c are too large for a float32.
        """
        if not expression.free_symbols & self.symbols:
            return expression
        if self._is_number(expression):
            return self._load(expression)
        loads: list[Any] = []
        rest = list(expression.args)
        if isinstance(expression, (sympy.Add, sympy.Mul)):
            number = expression.func(*(arg for arg in rest if self._is_number(arg)))
            if number.free_symbols:
                loads = [self._load(number)]
                rest = [arg for arg in rest if not self._is_number(arg)]
        return expression.func(*loads, *(self.loaded(arg) for arg in rest))

    def _load(self, number: sympy.Expr) -> Load:
        if number not in self.found:
            self.found.append(number)
        return Load(sympy.Integer(self.first + self.found.index(number)))

    def _is_number(self, expression: Any) -> bool:
        """Whether an expression is made of numbers alone, and can be computed."""
        return (
            not is_condition(expression)
            and not expression.has(Load, sympy.oo, -sympy.oo)
            and expression.free_symbols <= self.symbols
            and is_printable(expression)
        )
