"""Where a score and a sink read the operands that have gradients, and how these are summed.

An index whose axes hold b, h, q, k, k - q (with a sign and an offset) or a number says for each
element which scores read it: those of a row, a column, a diagonal, or one of each batch item and
head. Other indices (through floor, Mod, another operand) have no kernel.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import sympy

from adaattn_compiler.kernels.derivatives import float_loads
from adaattn_compiler.spec import POSITIONS, AttentionSpec, Load, b, h, k, q

# k - q, as the position of an axis.
STEP = sympy.Symbol("step", integer=True)


class Sums(enum.Enum):
    """Over what the scores are summed that read one element, in each batch item and head."""

    ROWS = "rows"  # over the keys, and then over the rows where none is in the index
    COLUMNS = "columns"
    DIAGONALS = "diagonals"
    ELEMENTS = "elements"


@dataclass(frozen=True)
class Axis:
    """One axis of an index: sign * position + offset; position: b, h, q, k, STEP, or None."""

    position: sympy.Symbol | None
    sign: int
    offset: Any


@dataclass(frozen=True)
class Reading:
    """A load to whose operand a gradient flows."""

    load: Load
    axes: tuple[Axis, ...]
    sums: Sums
    in_sink: bool

    @property
    def operand(self) -> int:
        """The operand that is read."""
        return int(self.load.args[0])

    def axis_of(self, position: sympy.Symbol) -> int | None:
        """Which axis holds a position."""
        found = (i for i, axis in enumerate(self.axes) if axis.position == position)
        return next(found, None)


def readings(spec: AttentionSpec) -> tuple[Reading, ...]:
    """All of a spec, in one order, but for those without a kernel. NoCode: no derivative."""
    return tuple(found for found in _readings(spec) if isinstance(found, Reading))


def differentiable(spec: AttentionSpec) -> frozenset[int]:
    """The operands to which a gradient can flow by a kernel."""
    return frozenset(each.operand for each in readings(spec))


def without_kernel(spec: AttentionSpec) -> dict[int, str]:
    """Why the gradient of an operand has no kernel, for each of which that is so."""
    refused = (found for found in _readings(spec) if not isinstance(found, Reading))
    return {int(load.args[0]): _reason(load) for load in refused}


def _readings(spec: AttentionSpec) -> list[Reading | Load]:
    """Loads of the score, then of the sink; as they are where there is no kernel."""
    return [
        _reading(load, in_sink) or load
        for expression, in_sink in ((spec.score, False), (spec.sink, True))
        for load in float_loads(spec, expression)
    ]


def _reason(load: Load) -> str:
    index = ", ".join(map(str, load.args[1:]))
    return f"no gradient kernel for operand {load.args[0]} read at ({index})"


def _reading(load: Load, in_sink: bool) -> Reading | None:
    axes = [_axis(place) for place in load.args[1:]]
    if any(axis is None for axis in axes):
        return None
    held = [axis.position for axis in axes if axis is not None and axis.position is not None]
    sums = _SUMS.get(frozenset(held) - {b, h})
    if sums is None or len(held) != len(set(held)):
        return None
    return Reading(load, tuple(axis for axis in axes if axis is not None), sums, in_sink)


def _axis(place: Any) -> Axis | None:
    if place in (b, h):
        return Axis(place, 1, sympy.Integer(0))
    expanded = sympy.expand(place)
    by_q, by_k = (expanded.coeff(position) for position in (q, k))
    offset = sympy.expand(expanded - by_q * q - by_k * k)
    if offset.has(Load, *POSITIONS):
        return None
    position = _POSITIONS.get((abs(by_q), abs(by_k), by_q * by_k))
    sign = by_k if by_k != 0 else by_q
    return None if position is None else Axis(position[0], int(sign), offset)


# By what q and k are multiplied, without signs, and both.
_POSITIONS: dict[tuple[Any, Any, Any], tuple[sympy.Symbol | None]] = {
    (0, 0, 0): (None,),
    (1, 0, 0): (q,),
    (0, 1, 0): (k,),
    (1, 1, -1): (STEP,),
}

_SUMS = {
    frozenset(): Sums.ROWS,
    frozenset({q}): Sums.ROWS,
    frozenset({k}): Sums.COLUMNS,
    frozenset({STEP}): Sums.DIAGONALS,
    frozenset({q, k}): Sums.ELEMENTS,
}
