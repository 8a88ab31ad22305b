"""Other sizes for a site: what each size, index and digit becomes when lengths are made short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from adaattn_compiler.passes.index_map import Axis, Digit, Index
from adaattn_compiler.passes.symbols import size_hint


@dataclass(frozen=True)
class Resizing:
    """New values for the sizes of a site: B, M and N, and the shape symbols in them.

    old, new: by name; symbols: values of shape symbols; fake: a tensor whose shape environment
    knows what other symbols were when captured (a mask may have a length of its own).
    """

    old: Mapping[str, int]
    new: Mapping[str, int]
    symbols: Mapping[sympy.Symbol, int]
    fake: Any = None

    @staticmethod
    def to(
        sizes: Mapping[str, sympy.Expr],
        hints: Mapping[str, int],
        new: Mapping[str, int],
        fake: Any = None,
    ) -> Resizing:
        """hints are the sizes as captured; new the ones to run at."""
        symbols: dict[sympy.Symbol, int] = {}
        for name in ("B", "M", "N"):
            free = [s for s in sizes[name].free_symbols if s not in symbols]
            if len(free) == 1:
                solutions = sympy.solve(sizes[name].subs(symbols) - new[name], free[0])
                symbols[free[0]] = int(solutions[0]) if solutions else new[name]
        return Resizing(dict(hints), dict(new), symbols, fake)

    def number(self, size: Any) -> int:
        """A size in a call: symbols by value, a number that is one of the old sizes by the new."""
        size = sympy.sympify(size)
        if not size.is_Integer:
            value = self.value(size)
            if not value.is_Integer:
                raise ValueError(f"size {size} has no value here")
            return int(value)
        return self._renamed(int(size))

    def value(self, expression: sympy.Expr) -> sympy.Expr:
        """An expression with values for its symbols."""
        others = expression.free_symbols - self.symbols.keys()
        known = {symbol: self._other(symbol) for symbol in others} if self.fake is not None else {}
        return expression.subs({**self.symbols, **known})

    def scalar(self, expression: sympy.Expr) -> int | float:
        """An expression's value as a Python number."""
        value = self.value(expression)
        return int(value) if value.is_Integer else float(value)

    def _other(self, symbol: sympy.Symbol) -> int | float:
        """A symbol that is no size of the site's: what it was, or the new size of what it was."""
        hint = size_hint(symbol, self.fake)
        return self._renamed(hint) if isinstance(hint, int) else float(hint)

    def _renamed(self, size: int) -> int:
        for name in ("M", "N", "B"):
            if size == self.old[name] and self.old[name] > 1:
                return self.new[name]
        return size

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is held as it is (a mask in a buffer): the first part of what was resized.

        As a model takes `mask[:n, :n]`, which is no call where n is all there is.
        """
        for dim, size in enumerate(tensor.shape):
            new = self._renamed(size)
            tensor = tensor.narrow(dim, 0, new) if new < size else tensor
        return tensor

    def axis_size(self, axis: Axis) -> int:
        """The new size of a canonical axis; others keep theirs."""
        names = {"b": "B", "q": "M", "k": "N"}
        if axis.name in names:
            return self.new[names[axis.name]]
        return self.number(axis.size) if not axis.size.is_Integer else int(axis.size)

    def digit_extent(self, digit: Digit) -> int:
        """The new extent of a digit of a canonical axis."""
        whole = digit.div == 1 and sympy.expand(digit.extent - digit.axis.size) == 0
        if whole:
            return self.axis_size(digit.axis)
        if digit.axis.name in ("b", "q", "k") and self.old != self.new:
            raise ValueError(f"{digit.axis} is cut in parts, so it keeps its size")
        return int(digit.extent)

    def extent(self, index: Index, size: sympy.Expr) -> int:
        """The new size of a dimension read at this index."""
        if not index.terms:
            return self.number(size)
        total = 1
        for digit, _ in index.terms:
            total *= self.digit_extent(digit)
        return total

    def gather(
        self, tensor: torch.Tensor, index: Sequence[Index], target: Sequence[Index]
    ) -> torch.Tensor:
        """result[target] = tensor[index], element by element."""
        axes: list[Digit] = []
        for position in target:
            axes += [digit for digit, _ in _outermost_first(position)]
        places: dict[Digit, torch.Tensor] = {}
        for i, digit in enumerate(axes):
            shape = [1] * len(axes)
            shape[i] = self.digit_extent(digit)
            places[digit] = torch.arange(shape[i]).reshape(shape)
        at = tuple(self._positions(position, places) for position in index)
        full = [self.digit_extent(digit) for digit in axes]
        values: torch.Tensor = tensor[at].expand(full) if at else tensor.expand(full)
        out_shape = []
        for position in target:
            extent = 1
            for digit, _ in position.terms:
                extent *= self.digit_extent(digit)
            out_shape.append(extent)
        result: torch.Tensor = values.reshape(out_shape)
        return result

    def _positions(self, index: Index, places: Mapping[Digit, torch.Tensor]) -> torch.Tensor:
        """A dimension's positions, in terms of the digits of the target."""
        total = torch.tensor(int(self.value(index.constant)))
        stride = 1
        for digit, _ in reversed(_outermost_first(index)):
            value = self._digit_value(digit, places)
            total = total + value * stride
            stride *= self.digit_extent(digit)
        return total

    def _digit_value(self, digit: Digit, places: Mapping[Digit, torch.Tensor]) -> Any:
        if digit in places:
            return places[digit]
        axis: Any = 0
        for known, value in places.items():
            if known.axis == digit.axis:
                axis = axis + value * int(known.div)
        return (axis // int(digit.div)) % self.digit_extent(digit)


def _outermost_first(index: Index) -> list[tuple[Digit, sympy.Expr]]:
    return sorted(index.terms, key=lambda term: _magnitude(term[1]), reverse=True)


def _magnitude(coef: sympy.Expr) -> int:
    return int(coef.subs(dict.fromkeys(coef.free_symbols, 1009)))
