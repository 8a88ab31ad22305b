"""Matrix products, and how to find the one that a tensor of scores comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.canonical_view import meta_of
from adaattn_compiler.passes.element_ops import POINTWISE, SCORE_OPS
from adaattn_compiler.passes.index_map import Axis, Index, NotAffine
from adaattn_compiler.passes.views import Access, broadcast_access, input_access, is_view

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """An element of a product: `alpha * sum_over(lhs * rhs) + beta * addend`."""

    lhs: Access
    rhs: Access
    over: Axis
    alpha: Any = 1
    beta: Any = 0
    addend: Access | None = None


def contraction_at(access: Access, name: str) -> Contraction | None:
    """What a product's element at this index sums, over a new axis of that name; else None."""
    node = access.node
    if node.target in (aten.bmm.default, aten.mm.default):
        named = arguments(node)
        return _matrix_product(access, named["self"], named["mat2"], name)
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        named = arguments(node)
        first, second = (
            ("batch1", "batch2") if node.target is aten.baddbmm.default else ("mat1", "mat2")
        )
        product = _matrix_product(access, named[first], named[second], name)
        addend = None if named["beta"] == 0 else broadcast_access(access, named["self"])
        return Contraction(
            product.lhs, product.rhs, product.over, named["alpha"], named["beta"], addend
        )
    return None


def is_contraction(node: fx.Node) -> bool:
    """Whether a node is a matrix product by one of torch's names for it."""
    return node.target in (
        aten.bmm.default,
        aten.mm.default,
        aten.baddbmm.default,
        aten.addmm.default,
    )


def _matrix_product(access: Access, lhs: fx.Node, rhs: fx.Node, name: str) -> Contraction:
    over = Axis(name, meta_of(lhs).shape[-1])
    *batch, row, column = access.index
    inner = Index.of_axis(over)
    return Contraction(
        Access(lhs, (*batch, row, inner)), Access(rhs, (*batch, inner, column)), over
    )


def products_below(scores: Access, over: str) -> Iterator[tuple[Access, Contraction]]:
    """The products that an element of the scores may come from, nearest first.

    Yields each product with the index at which it is read.
    """
    for access in _upward(scores, SCORE_OPS):
        product = contraction_at(access, over)
        if product is not None:
            yield access, product


def scores_accesses(scores: Access, product_node: fx.Node) -> list[Access]:
    """All elements that a score is computed from, down to the tensors that enter it from the side.

    Stops at the product itself; every side tensor is followed through its views.
    """
    return list(_upward(scores, POINTWISE, product_node))


def _upward(
    start: Access, followed: frozenset[Any], stop: fx.Node | None = None
) -> Iterator[Access]:
    """An element and those that it is computed from, nearest first, each once.

    Goes through views, casts and the followed ops, not past `stop`, which is left out.
    """
    pending = [start]
    seen: set[Access] = set()
    while pending:
        access = pending.pop(0)
        if access in seen or access.node is stop:
            continue
        seen.add(access)
        yield access
        try:
            below = input_access(access)
        except NotAffine:
            continue
        pending.extend([below] if below is not None else _operands(access, followed))


def _operands(access: Access, followed: frozenset[Any]) -> list[Access]:
    """The elements that an element of a pointwise op (or a product's addend) is computed from."""
    node = access.node
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        return [broadcast_access(access, arguments(node)["self"])]
    if node.target not in followed:
        return []
    return [
        broadcast_access(access, value)
        for value in arguments(node).values()
        if isinstance(value, fx.Node)
    ]


def obstacle(scores: fx.Node) -> fx.Node | None:
    """The op between the scores and the nearest product above them that is not followed.

    None where no product is above them at all.
    """
    pending: list[tuple[fx.Node, fx.Node | None]] = [(scores, None)]
    seen: set[fx.Node] = set()
    while pending:
        node, first = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if is_contraction(node):
            return first or node
        followed = is_view(node) or node.target in SCORE_OPS
        first = first if followed or first is not None else node
        pending.extend((above, first) for above in node.all_input_nodes)
    return None


class Spine:
    """The nodes that a product is above of."""

    def __init__(self, product_node: fx.Node) -> None:
        self._known: dict[fx.Node, bool] = {product_node: True}

    def holds(self, node: fx.Node) -> bool:
        """Whether the product is above this node (or is it)."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            unknown = [n for n in current.all_input_nodes if n not in self._known]
            if unknown:
                pending.extend(unknown)
                continue
            self._known[current] = any(self._known[n] for n in current.all_input_nodes)
            pending.pop()
        return self._known[node]
