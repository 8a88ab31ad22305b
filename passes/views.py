"""Where an element of a view lies in the tensor that it views.

`input_access` takes one step: from an element of a node's result to the element of its input that
it equals. It knows every op that moves elements and changes none (views, copies, casts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.arguments import arguments, wrapped_dim
from adaattn_compiler.passes.canonical_view import getitem, meta_of, size_expr
from adaattn_compiler.passes.index_map import Index, NotAffine, divide, is_less, reshaped

aten = torch.ops.aten


@dataclass(frozen=True)
class Access:
    """One element of a view node's tensor: index[i] is its position along dimension i."""

    node: fx.Node
    index: tuple[Index, ...]


def input_access(access: Access) -> Access | None:
    """The same element in the input of a view, copy or cast; None for any other op.

    Raises NotAffine where the op is a view whose map is not affine at this index, or one at which
    a gradient stops.
    """
    node = access.node
    if node.meta.get("stops") and is_view(node):
        raise NotAffine("a tensor whose gradient stops here")
    if node.target is getitem:
        return _part_access(access)
    rule = _RULES.get(node.target)
    return None if rule is None else rule(access, arguments(node))


def is_view(node: fx.Node) -> bool:
    """Whether a node moves elements and changes none."""
    return node.target in _RULES or node.target is getitem


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes (only) the dtype or device."""
    return node.target is aten._to_copy.default


_Rule = Callable[[Access, dict[str, Any]], Access]


def _same_index(access: Access, named: dict[str, Any]) -> Access:
    return Access(named["self"], access.index)


def _reshape(access: Access, named: dict[str, Any]) -> Access:
    source = named["self"]
    return Access(source, reshaped(access.index, meta_of(access.node).shape, meta_of(source).shape))


def broadcast_access(access: Access, source: fx.Node) -> Access:
    """The element of a (smaller) operand that broadcasting pairs with this element."""
    shape = meta_of(source).shape
    aligned = access.index[len(access.index) - len(shape) :] if shape else ()
    out_shape = meta_of(access.node).shape[len(access.index) - len(shape) :] if shape else ()
    return Access(
        source,
        tuple(
            Index() if size == 1 and out != 1 else position
            for position, size, out in zip(aligned, shape, out_shape, strict=True)
        ),
    )


def _expand(access: Access, named: dict[str, Any]) -> Access:
    return broadcast_access(access, named["self"])


def _repeat(access: Access, named: dict[str, Any]) -> Access:
    """Each dimension over and over, after new ones in front."""
    sizes = meta_of(named["self"]).shape
    new = len(access.index) - len(sizes)
    repeated = zip(access.index[new:], sizes, named["repeats"][new:], strict=True)
    return Access(
        named["self"],
        tuple(
            position if times == 1 else divide(position, size)[1]
            for position, size, times in repeated
        ),
    )


def _permute(access: Access, named: dict[str, Any]) -> Access:
    rank = len(access.index)
    order = [wrapped_dim(dim, rank) for dim in named["dims"]]
    return Access(named["self"], tuple(access.index[order.index(dim)] for dim in range(rank)))


def _transpose(access: Access, named: dict[str, Any]) -> Access:
    rank = len(access.index)
    if rank == 0:
        return _same_index(access, named)
    first, second = (wrapped_dim(named[key], rank) for key in ("dim0", "dim1"))
    index = list(access.index)
    index[first], index[second] = index[second], index[first]
    return Access(named["self"], tuple(index))


def _t(access: Access, named: dict[str, Any]) -> Access:
    return Access(named["self"], tuple(reversed(access.index)))


def _unsqueeze(access: Access, named: dict[str, Any]) -> Access:
    dim = wrapped_dim(named["dim"], len(access.index))
    return Access(named["self"], (*access.index[:dim], *access.index[dim + 1 :]))


def _squeeze(access: Access, named: dict[str, Any]) -> Access:
    """All of squeeze's overloads: dimensions of size 1 that the result lacks have index 0."""
    source = named["self"]
    shape = meta_of(source).shape
    dims = named.get("dim", range(len(shape)))
    dropped = {
        wrapped_dim(d, len(shape)) for d in (dims if isinstance(dims, Sequence | range) else [dims])
    }
    rest = iter(access.index)
    return Access(
        source,
        tuple(
            Index() if d in dropped and size == 1 else next(rest) for d, size in enumerate(shape)
        ),
    )


def _slice(access: Access, named: dict[str, Any]) -> Access:
    source = named["self"]
    dim = wrapped_dim(named["dim"], len(access.index))
    start = slice_start(named["start"], meta_of(source).shape[dim])
    moved = access.index[dim].scaled(size_expr(named["step"])).plus(Index.of_constant(start))
    return Access(source, (*access.index[:dim], moved, *access.index[dim + 1 :]))


def slice_start(start: Any, size: sympy.Expr) -> sympy.Expr:
    """The first index of a slice of a dimension, as a non-negative expression."""
    if start is None:
        return sympy.Integer(0)
    first = size_expr(start)
    if first.is_negative:
        first = sympy.Max(size + first, 0)
    elif not first.is_nonnegative:
        raise NotAffine(f"a slice that starts at {first}")
    return sympy.Min(first, size) if first.is_Integer and size.is_Integer else first


def _select(access: Access, named: dict[str, Any]) -> Access:
    source = named["self"]
    shape = meta_of(source).shape
    dim = wrapped_dim(named["dim"], len(shape))
    position = size_expr(named["index"])
    if position.is_negative:
        position = shape[dim] + position
    at = Index.of_constant(position)
    return Access(source, (*access.index[:dim], at, *access.index[dim:]))


def _flip(access: Access, named: dict[str, Any]) -> Access:
    shape = meta_of(access.node).shape
    dims = {wrapped_dim(dim, len(shape)) for dim in named["dims"]}
    return Access(
        named["self"],
        tuple(
            position.scaled(sympy.Integer(-1)).plus(Index.of_constant(size - 1))
            if d in dims
            else position
            for d, (position, size) in enumerate(zip(access.index, shape, strict=True))
        ),
    )


def _copied(access: Access, named: dict[str, Any]) -> Access:
    """`copy(self, src)` is src, broadcast to self's shape."""
    return broadcast_access(access, named["src"])


def _joined(access: Access, named: dict[str, Any]) -> Access:
    """The piece of a `cat` that holds the element, where its index tells which."""
    # An empty tensor of one dimension may stand beside any other (a cache not yet filled).
    pieces = [piece for piece in named["tensors"] if meta_of(piece).rank == len(access.index)]
    dim = wrapped_dim(named["dim"], len(access.index))
    position = access.index[dim]
    for piece in pieces:
        size = meta_of(piece).shape[dim]
        if is_less(position.largest, size):
            return Access(piece, (*access.index[:dim], position, *access.index[dim + 1 :]))
        if not (position.constant - size).is_nonnegative:
            raise NotAffine("an index that runs over the seam of a cat")
        position = position.plus(Index.of_constant(-size))
    raise NotAffine("an index past the end of a cat")


def paddings(named: dict[str, Any], rank: int) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """What constant_pad_nd adds before and after each dimension; negative where it cuts."""
    flat = [size_expr(size) for size in named["pad"]]
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    zero = sympy.Integer(0)
    return [(zero, zero)] * (rank - len(pairs)) + pairs[::-1]


def _padded(access: Access, named: dict[str, Any]) -> Access:
    """The inside of a padded tensor, where the index is surely in it."""
    source = named["self"]
    moved = []
    for position, size, (before, after) in zip(
        access.index, meta_of(source).shape, paddings(named, len(access.index)), strict=True
    ):
        inside = position.plus(Index.of_constant(-before))
        starts_inside = (position.constant - before).is_nonnegative
        ends_inside = is_less(inside.largest, size)
        if not (starts_inside and ends_inside) and (before, after) != (0, 0):
            raise NotAffine("an index that runs over the seam of a padding")
        moved.append(inside)
    return Access(source, tuple(moved))


def _part_access(access: Access) -> Access | None:
    """An item of what split, unbind and their kin return."""
    parent, position = access.node.args
    assert isinstance(parent, fx.Node)
    assert isinstance(position, int)
    if parent.target not in (
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
    ):
        return None
    named = arguments(parent)
    source = named["self"]
    rank = meta_of(source).rank
    dim = wrapped_dim(named["dim"], rank)
    if parent.target is aten.unbind.int:
        at = Index.of_constant(position)
        return Access(source, (*access.index[:dim], at, *access.index[dim:]))
    if parent.target is aten.split.Tensor:
        offset = size_expr(named["split_size"]) * position
    else:
        offset = sympy.Add(*(size_expr(s) for s in named["split_sizes"][:position]))
    moved = access.index[dim].plus(Index.of_constant(offset))
    return Access(source, (*access.index[:dim], moved, *access.index[dim + 1 :]))


_RULES: dict[Any, _Rule] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._reshape_alias.default: _reshape,
    aten.view_copy.default: _reshape,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.cat.default: _joined,
    aten.constant_pad_nd.default: _padded,
    aten.copy.default: _copied,
    aten.clone.default: _same_index,
    aten.contiguous.default: _same_index,
    aten.alias.default: _same_index,
    aten.detach.default: _same_index,
    aten.lift_fresh.default: _same_index,
    aten._to_copy.default: _same_index,
}
