"""A spec's expressions as Triton: what is done to a tile of scores.

`q` is a column of positions, `k` a row of them, `b` and `h` are scalars, `S` and whatever else
depends on both positions is a tile; `q_inside` and `k_inside` say which positions there are. Both
branches of a choice are computed: what only one of them reads is loaded under its condition. The
last axis of an operand is contiguous. Helper functions are those of functions.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
from sympy.core.relational import Relational

from adaattn_compiler.kernels.printing import SHARED_FORMS, Form, NoCode, Printer
from adaattn_compiler.spec import Load, Where, k, q

# What an element becomes when it is loaded, by the name that its torch dtype has without "torch.".
_LOADED = {
    "float32": "",
    "float64": "tl.float32",
    "bfloat16": "tl.float32",
    "float16": "tl.float32",
    "bool": "tl.int32",
    "int64": "",
    "int32": "tl.int64",  # a sum may pass 32 bits
    "int16": "tl.int32",
    "int8": "tl.int32",
    "uint8": "tl.int32",
}
_REAL = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Tile(Printer):
    """The Triton of one tile's expressions.

    dtypes: of the operands, names without "torch."; halves: see `Configuration`.
    """

    dtypes: Sequence[str]
    halves: bool = False

    language: ClassVar[str] = "Triton"
    forms: ClassVar[Mapping[Any, Form]] = {
        **SHARED_FORMS,
        sympy.Not: lambda parts: f"(~{parts[0]})",
        sympy.Abs: lambda parts: f"tl.abs({parts[0]})",
        sympy.tanh: lambda parts: f"tanh({parts[0]})",
    }

    def printed(self, expression: Any, guard: str | None = None) -> str:
        if isinstance(expression, Relational):
            expression = self._with_key_alone(expression)
        if self.halves and isinstance(expression, sympy.tanh):
            return f"tanh_of_halves({self.printed(expression.args[0], guard)})"
        return super().printed(expression, guard)

    def _with_key_alone(self, relation: Any) -> Any:
        """`k <= q` for `q - k >= 0`: what depends on rows alone is computed once for all keys."""
        difference = sympy.expand(relation.lhs - relation.rhs)
        sign = difference.coeff(k)
        rest = sympy.expand(difference - sign * k)
        if sign not in (1, -1) or rest.has(k) or not self.is_whole(rest):
            return relation
        kind = relation.func if sign == 1 else relation.reversed.func
        return kind(k, -sign * rest, evaluate=False)

    def symbol(self, symbol: Any) -> str:
        # Triton takes a number of run time for one of 32 bits where it fits.
        return self.wide(str(symbol)) if re.fullmatch(r"p\d+", str(symbol)) else str(symbol)

    def truth(self, value: bool) -> str:
        return str(value)

    def real(self, value: float) -> str:
        return 'float("inf")' if value == float("inf") else repr(value)

    def integer(self, value: int) -> str:
        return str(value) if value < 1 << 30 else self.wide(str(value))

    def wide(self, text: str) -> str:
        return f"tl.cast({text}, tl.int64)"

    def quotient(self, numerator: str, denominator: str, whole: bool) -> str:
        function = "floor_divide" if whole else "floor_of_quotient"
        return f"{function}({numerator}, {denominator})"

    def reciprocal(self, text: str) -> str:
        return f"(1.0 / {text})"

    def choice(self, where: Where, guard: str | None) -> str:
        condition = self.printed(where.args[0], guard)
        x = self.printed(where.args[1], _both(guard, condition))
        y = self.printed(where.args[2], _both(guard, f"(~{condition})"))
        return f"tl.where({condition}, {x}, {y})"

    def is_whole_operand(self, operand: int) -> bool:
        return self.dtypes[operand] not in _REAL

    def load(self, load: Load, guard: str | None) -> str:
        operand, index = int(load.args[0]), load.args[1:]
        dtype = self.dtypes[operand]
        if dtype not in _LOADED:
            raise NoCode(f"no Triton type for torch.{dtype}")
        parts = [f"operand{operand}_ptr"]
        for axis, place in enumerate(index):
            if place != 0:
                text = self.printed(place, guard)
                inner = axis == len(index) - 1  # its stride is 1
                parts.append(
                    text if inner else f"{self.wide(text)} * stride_operand{operand}_{axis}"
                )
        known = [f"{position}_inside" for position in (q, k) if load.has(position)]
        if guard is not None:
            known.append(guard)
            parts.append(f"tl.where({guard}, 0, 0)")  # as many places as conditions
        mask = f", mask={' & '.join(known)}, other=0" if known else ""
        text = f"tl.load({' + '.join(parts)}{mask})"
        if dtype == "bool":
            text = f"({text} != 0)"
        to = _LOADED[dtype]
        return f"{text}.to({to})" if to else text


def _both(guard: str | None, condition: str) -> str:
    return condition if guard is None else f"({guard} & {condition})"
