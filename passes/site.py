"""A matched attention: its spec, and where in the canonical view its tensors are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from adaattn_compiler.passes.axes import AttentionAxes
from adaattn_compiler.passes.index_map import Axis, Index, Size
from adaattn_compiler.passes.views import Access
from adaattn_compiler.spec import AttentionSpec


@dataclass(frozen=True)
class Operand:
    """A tensor of the site as the view has it.

    access: the element at canonical axes (and `inner`); target: the index of each dimension that
    the tensor shall have, so that `tensor[target] == access`.
    """

    access: Access
    target: tuple[Index, ...]


@dataclass(frozen=True)
class SideTensor:
    """A tensor that the score or the mask reads.

    node: where it is. distance: where set, the element depends on key - query only, and the tensor
    is the vector over k - q + M - 1 (with a leading head axis) of the element read at `access`.
    """

    node: fx.Node
    distance: Access | None = None


@dataclass(frozen=True)
class Site:
    """One attention computation in a graph.

    anchor: its softmax or SDPA call; output: the node of its result, read at `result`.
    scale_factor: a factor of the scores that is not a number (multiplied onto Q), or None.
    scores, noise: what the site computes anew (the product of Q and K, the draw of a dropout), so
    that nothing else may need it.
    requires_grad: whether a gradient must flow through it.
    assumes: which of the graph's inputs are buffers whose values the spec was read from.
    readings: elements of masks and biases with the expressions that they were read as (over the
    spec's operands).
    numbers: expressions over symbols of floats, each an operand without axes after those of sides
    (numbers.py).
    """

    name: str
    spelling: str
    spec: AttentionSpec
    axes: AttentionAxes
    q: Operand
    k: Operand
    v: Operand
    sides: tuple[SideTensor, ...]
    params: tuple[sympy.Expr, ...]
    scale_factor: Any
    anchor: fx.Node
    output: fx.Node
    result: tuple[Index, ...]
    inner: Axis
    value_axis: Axis
    scores: fx.Node | None = None
    noise: tuple[fx.Node, ...] = ()
    requires_grad: bool = False
    assumes: frozenset[int] = field(default=frozenset())
    readings: tuple[tuple[Access, Any], ...] = field(default=())
    numbers: tuple[sympy.Expr, ...] = ()

    def refused(self, reason: str) -> Refused:
        """The site, left alone."""
        return Refused(self.name, self.spelling, reason, self.anchor)

    @property
    def fake(self) -> Any:
        """A fake tensor of the site, whose shape environment knows the sizes as captured."""
        return self.q.access.node.meta["fake"]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The nodes that its kernel reads."""
        sides = [side.distance.node if side.distance else side.node for side in self.sides]
        return (*(operand.access.node for operand in (self.q, self.k, self.v)), *sides)

    @property
    def sizes(self) -> dict[str, Size]:
        """B, H, G, M, N, D, E."""
        return {
            "B": self.axes.batch.size,
            "H": self.axes.head.size,
            "G": sympy.cancel(self.axes.head.size / self.axes.group),
            "M": self.axes.query.size,
            "N": self.axes.key.size,
            "D": self.inner.size,
            "E": self.value_axis.size,
        }


@dataclass(frozen=True)
class Refused:
    """An attention that was seen and is left alone."""

    name: str
    spelling: str
    reason: str
    anchor: fx.Node


def checked(
    found: Sequence[Site | Refused], reason_against: Callable[[Site], str | None]
) -> list[Site | Refused]:
    """The sites against which there is no reason; the others refused, each with its own."""
    out: list[Site | Refused] = []
    for item in found:
        reason = reason_against(item) if isinstance(item, Site) else None
        out.append(item if isinstance(item, Refused) or reason is None else item.refused(reason))
    return out
