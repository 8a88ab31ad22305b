"""Which tensor of the view to take for Q, K or V.

From the operand of a product one can walk up through views, copies and scalings: every tensor on
the way holds the same numbers (up to a factor) in another layout. The best is the highest one
whose dimensions are the axes wanted, no two folded together: it needs no copy, and K and V are
taken before their heads were repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.axes import AttentionAxes
from adaattn_compiler.passes.canonical_view import CanonicalView, meta_of
from adaattn_compiler.passes.index_map import ONE, Index, NotAffine
from adaattn_compiler.passes.site import Operand
from adaattn_compiler.passes.views import Access, broadcast_access, input_access
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten


@dataclass(frozen=True)
class Link:
    """A tensor on the way up: product operand = factor * this element."""

    access: Access
    factor: sympy.Expr


def operand_chain(view: CanonicalView, access: Access) -> tuple[Link, ...]:
    """The tensors that hold a product's operand, nearest first, of the operand's dtype."""
    return tuple(_links(view, access))


def _links(view: CanonicalView, access: Access) -> Iterator[Link]:
    dtype = meta_of(access.node).dtype
    factor: sympy.Expr = ONE
    current: Access | None = access
    while current is not None and meta_of(current.node).dtype == dtype:
        yield Link(current, factor)
        try:
            below = input_access(current)
        except NotAffine:
            return
        if below is None:
            below, step = _unscaled(view, current)
            factor = factor * step
        current = below


def _unscaled(view: CanonicalView, access: Access) -> tuple[Access | None, sympy.Expr]:
    """Through a product with, or a quotient by, a number."""
    node = access.node
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return None, ONE
    named = arguments(node)
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    pairs = [("self", "other")] if divides else [("self", "other"), ("other", "self")]
    for kept, scale in pairs:
        number = plain_number(view, named[scale])
        if isinstance(named[kept], fx.Node) and number is not None and number != 0:
            below = broadcast_access(access, named[kept])
            return below, 1 / sympy.Float(number) if divides else sympy.Float(number)
    return None, ONE


def plain_number(view: CanonicalView, value: Any) -> float | None:
    """A Python number, or the value of a constant tensor of one element; else None."""
    if isinstance(value, fx.Node):
        if value.target in (aten.lift_fresh.default, aten.clone.default, aten._to_copy.default):
            return plain_number(view, arguments(value)["self"])
        constant = view.constants.get(value)
        if constant is not None and constant.numel() == 1:
            return float(constant.item())
        if value.target is aten.full.default and meta_of(value).rank == 0:
            return plain_number(view, arguments(value)["fill_value"])
        if value.target is aten.scalar_tensor.default:
            return plain_number(view, arguments(value)["s"])
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def chosen_operand(
    chain: Sequence[Link], axes: AttentionAxes, target: tuple[Index, ...]
) -> tuple[Operand, sympy.Expr]:
    """The best link of a chain for the wanted layout, and the factor that is left out by it.

    Raises Refusal where none can be brought into it.
    """
    renamed: list[Link] = []
    for link in chain:
        try:
            index = tuple(axes.renamed(position) for position in link.access.index)
        except NotAffine:
            break
        renamed.append(Link(Access(link.access.node, index), link.factor))
    direct = [
        link
        for link in renamed
        if is_direct(link.access.index, meta_of(link.access.node).shape, target)
    ]
    usable = direct or [link for link in renamed if _is_whole(link.access, target)]
    if not usable:
        raise Refusal("an operand whose layout is not understood", chain[0].access.node)
    best = usable[-1]
    return Operand(best.access, target), best.factor


def is_direct(index: Sequence[Index], sizes: Sequence[sympy.Expr], target: Sequence[Index]) -> bool:
    """Whether each dimension is all of a wanted axis (or of size 1) and none occurs twice."""
    if any(sympy.expand(extent_of(p) - s) != 0 for p, s in zip(index, sizes, strict=True)):
        return False
    used = [position for position in index if position != Index()]
    return len(set(used)) == len(used) and all(position in target for position in used)


def extent_of(index: Index) -> sympy.Expr:
    """How many values an index takes that is made of digits."""
    return sympy.expand(sympy.Mul(*(digit.extent for digit, _ in index.terms)))


def _is_whole(access: Access, target: Sequence[Index]) -> bool:
    """Whether each dimension is a mixed-radix number of digits of the wanted axes."""
    wanted = {digit for position in target for digit, _ in position.terms}
    try:
        parts = [
            mixed_radix(p, s) for p, s in zip(access.index, meta_of(access.node).shape, strict=True)
        ]
    except NotAffine:
        return False
    flat = [digit for dim in parts for digit in dim]
    ours = {digit.axis for digit in wanted}
    return len(set(flat)) == len(flat) and all(digit.axis in ours for digit in flat)


def mixed_radix(index: Index, size: sympy.Expr) -> list[Any]:
    """The digits, outermost first, that run through a dimension of that size exactly once.

    Raises NotAffine where the index does something else (a slice, a broadcast of a part).
    """
    if index.constant != 0:
        raise NotAffine("an offset")
    left = dict(index.terms)
    digits = []
    stride = ONE
    while left:
        digit = next((d for d, coef in left.items() if sympy.expand(coef - stride) == 0), None)
        if digit is None:
            raise NotAffine("not a mixed-radix number")
        del left[digit]
        digits.append(digit)
        stride = sympy.expand(stride * digit.extent)
    if sympy.expand(stride - size) != 0:
        raise NotAffine("a part of a dimension")
    return digits[::-1]
