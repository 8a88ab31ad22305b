"""A relative bias as a vector over the distance between key and query.

The bias of T5 and its kin is a tensor [H,M,N] whose element depends on k - q alone. Evaluated at
one query and key for each distance, by the model's own operations in the model's own precision,
it is a vector [H, M+N-1] with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.kernels.evaluate import arange, evaluate
from adaattn_compiler.kernels.problem import Sizes
from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.axes import AttentionAxes
from adaattn_compiler.passes.canonical_view import meta_of
from adaattn_compiler.passes.element_ops import POINTWISE
from adaattn_compiler.passes.emit import Emitter
from adaattn_compiler.passes.index_map import Index, NotAffine
from adaattn_compiler.passes.views import Access, broadcast_access, input_access
from adaattn_compiler.spec import Refusal, b, h, k, q

aten = torch.ops.aten


def distance_vector(emitter: Emitter, access: Access, axes: AttentionAxes, sizes: Sizes) -> fx.Node:
    """[H, M+N-1]: the element at `access` for distance k - q = t - (M-1), t = 0, 1, ...

    Raises Refusal where an op on the way is not understood.
    """
    like = emitter.like()
    head = emitter.call(lambda x, s: arange(s.heads, x).reshape(-1, 1), like, sizes)
    step = emitter.call(lambda x, s: arange(s.rows + s.columns - 1, x) - (s.rows - 1), like, sizes)
    row = emitter.call(lambda t: (-t).clamp(min=0), step)
    column = emitter.call(lambda t: t.clamp(min=0), step)
    sampler = _Sampler(emitter, axes, {h: head, q: row, k: column, b: 0})
    vector = sampler.sample(access)
    whole: fx.Node = emitter.call(
        lambda x, s: x.expand(s.heads, s.rows + s.columns - 1), vector, sizes
    )
    return whole


class _Sampler:
    """Writes the elements of tensors at given positions."""

    def __init__(
        self, emitter: Emitter, axes: AttentionAxes, places: Mapping[sympy.Symbol, Any]
    ) -> None:
        self.emitter = emitter
        self.axes = axes
        self.places = places
        self.memo: dict[Access, Any] = {}

    def sample(self, access: Access) -> Any:
        """The elements at the places, as one tensor that broadcasts to [H, T]."""
        if access not in self.memo:
            self.memo[access] = self._sample(access)
        return self.memo[access]

    def _sample(self, access: Access) -> Any:
        node = access.node
        try:
            below = input_access(access)
        except NotAffine as error:
            raise Refusal(f"a bias by distance that cannot be evaluated: {error}", node) from error
        if below is not None:
            value = self.sample(below)
            source, target = meta_of(below.node).dtype, meta_of(node).dtype
            return value if source == target else self.emitter.method("to", value, target)
        if node.target in POINTWISE:
            return self._pointwise(access)
        if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return self._arange(access)
        if node.target in _FILLED:
            return self.emitter.call(
                lambda like: torch.full_like(
                    like, _FILLED[node.target](arguments(node)), dtype=meta_of(node).dtype
                ),
                self.places[q],
            )
        if node.target is aten.embedding.default:
            return self._embedding(access)
        return self._leaf(access)

    def _pointwise(self, access: Access) -> Any:
        node = access.node

        def operand(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return self.sample(broadcast_access(access, value))
            return value

        args = [operand(value) for value in node.args]
        kwargs = {key: operand(value) for key, value in node.kwargs.items()}
        target: Any = node.target
        return self.emitter.call(target, *args, **kwargs)

    def _arange(self, access: Access) -> Any:
        named = arguments(access.node)
        place = self._place(access.index[0])
        start, step = named.get("start", 0), named.get("step", 1)
        dtype = meta_of(access.node).dtype
        return self.emitter.call(lambda i: (i * step + start).to(dtype), place)

    def _embedding(self, access: Access) -> Any:
        named = arguments(access.node)
        rows = self.sample(Access(named["indices"], access.index[:-1]))
        weight = self.emitter.tensor(named["weight"])
        column = self._place(access.index[-1])
        return self.emitter.call(lambda w, r, c: w[r, c], weight, rows, column)

    def _leaf(self, access: Access) -> Any:
        if any(position.axes for position in access.index if _mentions_both(position, self.axes)):
            raise Refusal("a bias by distance that is not made from positions", access.node)
        tensor = self.emitter.tensor(access.node)
        places = [self._place(position) for position in access.index]
        if not places:
            return tensor
        return self.emitter.call(lambda x, at: x[tuple(at)], tensor, places)

    def _place(self, index: Index) -> Any:
        expression = index.expression(self.axes.names)
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            return self.places[expression]
        names, values = list(self.places), list(self.places.values())
        return self.emitter.call(
            lambda given: evaluate(expression, dict(zip(names, given, strict=True)), _no_loads),
            values,
        )


def _no_loads(number: int, index: Any) -> Any:
    raise Refusal("a load in a position")


def _mentions_both(position: Index, axes: AttentionAxes) -> bool:
    return {axes.query, axes.key} <= position.axes


_FILLED: dict[Any, Any] = {
    aten.full.default: lambda named: named["fill_value"],
    aten.full_like.default: lambda named: named["fill_value"],
    aten.zeros.default: lambda named: 0,
    aten.zeros_like.default: lambda named: 0,
    aten.ones.default: lambda named: 1,
    aten.ones_like.default: lambda named: 1,
    aten.scalar_tensor.default: lambda named: named["s"],
}
