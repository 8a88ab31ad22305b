"""What the modifiers of flex_attention read, and an expression as a modifier that reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from adaattn_compiler.kernels.evaluate import evaluate
from adaattn_compiler.kernels.flex_inductor import read_table
from adaattn_compiler.spec import Load, S, b, h, k, q


@dataclass(frozen=True)
class Table:
    """An operand, its axes that are read at 0 dropped, flat."""

    operand: int
    index: tuple[sympy.Expr, ...]

    def of(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor = operands[self.operand]
        return tensor[tuple(0 if i == 0 else slice(None) for i in self.index)].contiguous()

    @property
    def places(self) -> tuple[sympy.Expr, ...]:
        """The index without what was dropped."""
        return tuple(i for i in self.index if i != 0)


@dataclass(frozen=True)
class Reads:
    """All that an expression reads: tables by load, and sizes."""

    tables: tuple[Table, ...]
    sizes: tuple[sympy.Symbol, ...]

    @staticmethod
    def of(expression: Any) -> Reads:
        loads = sorted(expression.atoms(Load), key=str)
        tables = {Table(int(load.args[0]), load.args[1:]): None for load in loads}
        sizes = sorted(expression.free_symbols - {b, h, q, k, S}, key=str)
        return Reads(tuple(tables), tuple(sizes))

    def operands(self, kinds: Sequence[torch.dtype]) -> list[tuple[torch.dtype, int]]:
        """(dtype, rank) of what `values` gives: tables flat with strides, then sizes."""
        out: list[tuple[torch.dtype, int]] = []
        for table in self.tables:
            out.append((kinds[table.operand], min(len(table.places), 1)))
            out += [(torch.int64, 0)] * max(len(table.places) - 1, 0)
        return out + [(torch.int64, 0)] * len(self.sizes)

    def values(
        self, operands: Sequence[torch.Tensor], sizes: dict[sympy.Symbol, int]
    ) -> list[torch.Tensor | int]:
        out: list[torch.Tensor | int] = []
        for table in self.tables:
            tensor = table.of(operands)
            out.append(tensor.reshape(-1) if tensor.dim() else tensor)
            out += tensor.stride()[:-1]
        return out + [sizes[symbol] for symbol in self.sizes]

    def modifier(self, expression: Any) -> Callable[..., Any]:
        """The expression as a function of (positions and S) and what `values` gives."""

        def modified(given: dict[sympy.Symbol, Any], captured: Sequence[Any]) -> Any:
            tables: dict[Table, tuple[Any, list[Any]]] = {}
            rest = list(captured)
            for table in self.tables:
                flat = rest.pop(0)
                strides = [rest.pop(0) for _ in range(max(len(table.places) - 1, 0))]
                tables[table] = (flat, strides)
            values = {**given, **dict(zip(self.sizes, rest, strict=False))}

            def load(number: int, index: tuple[sympy.Expr, ...]) -> Any:
                table = Table(number, index)
                flat, strides = tables[table]
                if not table.places:
                    return flat
                places = [evaluate(place, values, load) for place in table.places]
                at = places[-1]
                for place, stride in zip(places[:-1], strides, strict=True):
                    at = at + place * stride
                return read_table(flat, at)

            return evaluate(expression, values, load)

        return modified
