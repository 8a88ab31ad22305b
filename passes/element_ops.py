"""How the element of each op's result is read from the elements of its operands.

One reader for each kind of op, registered in `READERS` under the ops that it reads. A reader gets
the element's access and the call's arguments by name; it raises `Unreadable` where there is no
expression, and the result is loaded then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from adaattn_compiler.passes.arguments import arguments, wrapped_dim
from adaattn_compiler.passes.canonical_view import meta_of
from adaattn_compiler.passes.expressions import (
    INEXACT,
    RowStatistic,
    Trunc,
    Unreadable,
    as_condition,
    as_number,
    chosen_condition,
    holds_integers,
    is_condition,
    lifted,
    number_of,
)
from adaattn_compiler.passes.index_map import Axis, Index, is_less
from adaattn_compiler.passes.views import Access, paddings
from adaattn_compiler.spec import Where, k, q

aten = torch.ops.aten


class Elements(Protocol):
    """What a reader may ask: other elements of the same view (element.py)."""

    @property
    def axes(self) -> Mapping[Axis, sympy.Expr]:
        """The expression of each loop axis."""

    def read(self, access: Access) -> Any:
        """The element."""

    def number(self, access: Access) -> sympy.Expr:
        """The element as a number."""

    def condition(self, access: Access) -> Boolean:
        """The element as a condition."""

    def load(self, access: Access) -> Any:
        """The element as read from the tensor itself."""

    def operand(self, access: Access, value: Any) -> Any:
        """An operand of a pointwise op."""

    def index_of(self, element: sympy.Expr) -> Index:
        """A position computed by the graph as an index."""

    def is_row_statistic(self, access: Access) -> bool:
        """Whether a reduction is the same for every key of a row."""


_Reader = Callable[[Elements, Access, dict[str, Any]], Any]


def _pointwise(names: tuple[str, ...], function: Callable[..., Any]) -> _Reader:
    def read(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
        operands = (as_number(reader.operand(access, named[name])) for name in names)
        return lifted(function, *operands)

    return read


def _added(sign: int) -> _Reader:
    def read(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
        x = as_number(reader.operand(access, named["self"]))
        y = as_number(reader.operand(access, named["other"]))
        alpha = as_number(number_of(named.get("alpha", 1)))
        return lifted(lambda a, c: a + sign * alpha * c, x, y)

    return read


def _rsub(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    x = as_number(reader.operand(access, named["self"]))
    y = as_number(reader.operand(access, named["other"]))
    return lifted(lambda a, c: c - as_number(number_of(named.get("alpha", 1))) * a, x, y)


def _multiplied(x: Any, y: Any) -> Any:
    """x * y, with 0 * inf left unread (it is NaN)."""
    product = x * y
    if product is sympy.nan:
        raise Unreadable("0 * inf")
    return product


def _divided(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    x = as_number(reader.operand(access, named["self"]))
    y = as_number(reader.operand(access, named["other"]))
    mode = named.get("rounding_mode")
    if y == 0:
        raise Unreadable("division by 0")
    if mode is None:
        return lifted(lambda a, c: a / c, x, y)
    return lifted(lambda a, c: sympy.floor(a / c) if mode == "floor" else Trunc(a / c), x, y)


def _floor_divided(x: Any, y: Any) -> Any:
    return sympy.floor(x / y)


def _comparison(relation: Callable[[Any, Any], Any]) -> _Reader:
    def read(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
        x = reader.operand(access, named["self"])
        y = reader.operand(access, named["other"])
        if is_condition(x) and is_condition(y):
            if relation is sympy.Eq:
                return ~(x ^ y)
            if relation is sympy.Ne:
                return x ^ y
        x, y = as_number(x), as_number(y)
        if x == y and not x.is_number and not x.is_integer:
            raise Unreadable("a comparison that tells NaN")
        return lifted(relation, x, y)

    return read


def _logical(function: Callable[..., Any], names: tuple[str, ...]) -> _Reader:
    """and, or, xor, not: logical ones on anything, bitwise ones on booleans only."""

    def read(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
        bitwise = "bitwise" in str(access.node.target)
        if bitwise and meta_of(access.node).dtype != torch.bool:
            raise Unreadable("bitwise arithmetic on integers")
        return function(*(as_condition(reader.operand(access, named[name])) for name in names))

    return read


def _where(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    condition = as_condition(reader.operand(access, named["condition"]))
    x, y = (reader.operand(access, named[name]) for name in ("self", "other"))
    return _chosen(condition, x, y)


def _masked_fill(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    condition = as_condition(reader.operand(access, named["mask"]))
    return _chosen(
        condition, reader.operand(access, named["value"]), reader.operand(access, named["self"])
    )


def _chosen(condition: Boolean, x: Any, y: Any) -> Any:
    if is_condition(x) and is_condition(y):
        return chosen_condition(condition, x, y)
    return Where(condition, as_number(x), as_number(y))


def _clamped(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    x = as_number(reader.operand(access, named["self"]))
    if named.get("min") is not None:
        x = lifted(sympy.Max, x, as_number(reader.operand(access, named["min"])))
    if named.get("max") is not None:
        x = lifted(sympy.Min, x, as_number(reader.operand(access, named["max"])))
    return x


def _filled(value: str | int | bool | float) -> _Reader:
    """A tensor of one value: that of a named argument, or the constant itself."""

    def read(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
        element = (
            reader.operand(Access(access.node, access.index), named[value])
            if isinstance(value, str)
            else number_of(value)
        )
        if meta_of(access.node).dtype == torch.bool:
            return as_condition(element)
        return as_number(element)

    return read


def _arange(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    if not holds_integers(meta_of(access.node).dtype):
        raise Unreadable("positions that are rounded")
    start = as_number(number_of(named.get("start", 0)))
    step = as_number(number_of(named.get("step", 1)))
    return start + step * access.index[0].expression(reader.axes)


def _triangle(keeps: Callable[[Any, Any], Any]) -> _Reader:
    def read(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
        row, column = (position.expression(reader.axes) for position in access.index[-2:])
        inside = keeps(column - row, as_number(number_of(named["diagonal"])))
        return (
            _chosen(inside, reader.read(Access(named["self"], access.index)), sympy.Integer(0))
            if (meta_of(access.node).dtype != torch.bool)
            else sympy.And(inside, reader.condition(Access(named["self"], access.index)))
        )

    return read


def _indexed(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    """`x[i, j, ...]` with index tensors for leading dimensions (all adjacent)."""
    source, indices = named["self"], list(named["indices"])
    if any(i is None for i in indices) or any(meta_of(i).dtype == torch.bool for i in indices):
        raise Unreadable("an index that is not a tensor of integers for each leading dimension")
    rank = max(meta_of(i).rank for i in indices)
    shape = meta_of(access.node).shape
    front = access.index[:rank]
    positions = []
    for dim, index_node in enumerate(indices):
        element = reader.number(_aligned(front, shape[:rank], index_node))
        size = meta_of(source).shape[dim]
        if not element.is_nonnegative:
            element = Where(element < 0, element + size, element)
        positions.append(reader.index_of(element))
    return reader.read(Access(source, (*positions, *access.index[rank:])))


def _aligned(front: tuple[Index, ...], shape: tuple[sympy.Expr, ...], source: fx.Node) -> Access:
    """The element of an index tensor that broadcasting pairs with this position."""
    sizes = meta_of(source).shape
    offset = len(front) - len(sizes)
    return Access(
        source,
        tuple(
            Index() if size == 1 and shape[offset + d] != 1 else front[offset + d]
            for d, size in enumerate(sizes)
        ),
    )


def _embedding(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    row = reader.number(Access(named["indices"], access.index[:-1]))
    return reader.load(Access(named["weight"], (Index.of_constant(row), access.index[-1])))


def _index_select(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    dim = wrapped_dim(named["dim"], len(access.index))
    row = reader.number(Access(named["index"], (access.index[dim],)))
    index = (*access.index[:dim], Index.of_constant(row), *access.index[dim + 1 :])
    return reader.read(Access(named["self"], index))


def _row_statistic(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    """A maximum or log-sum-exp of scores along their keys (or more): the same for all of a row."""
    if not reader.is_row_statistic(access):
        raise Unreadable("a reduction that is not the same for every key")
    return RowStatistic(
        sympy.Symbol(access.node.name), *(p.expression(reader.axes) for p in access.index)
    )


def _detached(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    """Without its gradient: of a row's maximum that is no loss, any other is read as it is."""
    element = reader.read(Access(named["self"], access.index))
    if isinstance(element, RowStatistic):
        return element
    raise Unreadable("a tensor whose gradient stops here")


def item_element(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    """The values of `max(dim)`; items of other results are loaded."""
    parent, position = access.node.args
    if isinstance(parent, fx.Node) and parent.target is aten.max.dim and position == 0:
        return _row_statistic(reader, Access(parent, access.index), arguments(parent))
    raise Unreadable("an item of a result")


def _cumsum(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    """The running sum of a constant; of anything else it is loaded."""
    dim = wrapped_dim(named["dim"], len(access.index))
    element = reader.number(Access(named["self"], access.index))
    if not element.is_number:
        raise Unreadable("a running sum of data")
    return element * (access.index[dim].expression(reader.axes) + 1)


def _cat(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    """Two pieces, the first of one element: one expression where both agree at the seam."""
    pieces = [piece for piece in named["tensors"] if meta_of(piece).rank == len(access.index)]
    dim = wrapped_dim(named["dim"], len(access.index))
    if len(pieces) == 1:
        return reader.read(Access(pieces[0], access.index))
    if len(pieces) != 2 or meta_of(pieces[0]).shape[dim] != 1:
        raise Unreadable("a cat of tensors")
    position = access.index[dim]
    shifted = position.plus(Index.of_constant(-1))
    first, rest = (
        reader.number(Access(piece, (*access.index[:dim], at, *access.index[dim + 1 :])))
        for piece, at in zip(pieces, (Index(), shifted), strict=True)
    )
    place = position.expression(reader.axes)
    if not place.is_Symbol or sympy.expand(rest.subs(place, 0) - first) != 0:
        raise Unreadable("a cat whose pieces differ")
    return rest


def _padded(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
    """An element of the padding; what is inside has been read as a view by now."""
    for position, size, (before, _) in zip(
        access.index, meta_of(named["self"]).shape, paddings(named, len(access.index)), strict=True
    ):
        if is_less(position.largest, before) or (position.constant - size - before).is_nonnegative:
            return as_number(number_of(named["value"]))
    raise Unreadable("an index that runs over the seam of a padding")


def _inexact(name: str) -> _Reader:
    """A transcendental function: told apart and compared, never computed again from its name."""
    function = sympy.Function(f"{INEXACT}{name}", real=True)

    def read(reader: Elements, access: Access, named: dict[str, Any]) -> Any:
        operands = [
            as_number(reader.operand(access, value))
            for value in named.values()
            if value is not None
        ]
        element = function(*operands)
        if element.has(q) and element.has(k):
            return element
        return reader.load(access)

    return read


_BINARY = ("self", "other")
READERS: dict[Any, _Reader] = {}


def _register(reader: _Reader, *targets: Any) -> None:
    for target in targets:
        READERS[target] = reader


_register(_added(1), aten.add.Tensor, aten.add.Scalar)
_register(_added(-1), aten.sub.Tensor, aten.sub.Scalar)
_register(_rsub, aten.rsub.Scalar, aten.rsub.Tensor)
_register(_pointwise(_BINARY, _multiplied), aten.mul.Tensor, aten.mul.Scalar)
_register(_divided, aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
_register(_pointwise(_BINARY, _floor_divided), aten.floor_divide.default)
_register(_pointwise(_BINARY, sympy.Mod), aten.remainder.Tensor, aten.remainder.Scalar)
_register(_pointwise(("self",), lambda x: -x), aten.neg.default)
_register(_pointwise(("self",), sympy.Abs), aten.abs.default)
_register(_pointwise(("self",), sympy.floor), aten.floor.default)
_register(_pointwise(("self",), sympy.tanh), aten.tanh.default)
_register(_pointwise(_BINARY, sympy.Min), aten.minimum.default)
_register(_pointwise(_BINARY, sympy.Max), aten.maximum.default)
_register(
    _clamped, aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default
)
for _relation, _name in (
    (sympy.Eq, "eq"),
    (sympy.Ne, "ne"),
    (sympy.Lt, "lt"),
    (sympy.Le, "le"),
    (sympy.Gt, "gt"),
    (sympy.Ge, "ge"),
):
    _packet = getattr(aten, _name)
    _register(_comparison(_relation), _packet.Tensor, _packet.Scalar)
_register(
    _logical(sympy.And, _BINARY),
    aten.logical_and.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_and.Scalar,
)
_register(
    _logical(sympy.Or, _BINARY),
    aten.logical_or.default,
    aten.bitwise_or.Tensor,
    aten.bitwise_or.Scalar,
)
_register(
    _logical(sympy.Xor, _BINARY),
    aten.logical_xor.default,
    aten.bitwise_xor.Tensor,
    aten.bitwise_xor.Scalar,
)
_register(_logical(sympy.Not, ("self",)), aten.logical_not.default, aten.bitwise_not.default)
_register(_where, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_register(_masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_register(
    _filled("fill_value"),
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
)
_register(_filled("value"), aten.fill.Scalar, aten.fill.Tensor)
_register(_filled("s"), aten.scalar_tensor.default)
_register(_filled(1), aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_register(
    _filled(0),
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.zero.default,
)
_register(_arange, aten.arange.default, aten.arange.start, aten.arange.start_step)
_register(_triangle(lambda offset, diagonal: offset <= diagonal), aten.tril.default)
_register(_triangle(lambda offset, diagonal: offset >= diagonal), aten.triu.default)
_register(_indexed, aten.index.Tensor)
_register(_embedding, aten.embedding.default)
_register(_index_select, aten.index_select.default)
_register(_row_statistic, aten.amax.default, aten.max.default, aten.logsumexp.default)
_register(_detached, aten.detach.default)
_register(_padded, aten.constant_pad_nd.default)
_register(_cumsum, aten.cumsum.default)
_register(_cat, aten.cat.default)
_TRANSCENDENTAL: dict[Any, str] = {
    **{getattr(aten, name).default: name for name in ("log", "exp", "sqrt", "rsqrt", "log2")},
    aten.sigmoid.default: "sigmoid",
    **dict.fromkeys((aten.pow.Scalar, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), "pow"),
}
for _target, _name in _TRANSCENDENTAL.items():
    _register(_inexact(_name), _target)

# Ops whose result at an element needs no more than its operands there.
POINTWISE: frozenset[Any] = frozenset(
    target
    for target in READERS
    if target._schema.name.split("::")[-1].rstrip("_")
    in {
        *("add", "sub", "rsub", "mul", "div", "floor_divide", "remainder", "neg", "abs", "floor"),
        *("tanh", "minimum", "maximum", "clamp", "clamp_min", "clamp_max", "where", "masked_fill"),
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"),
        *("bitwise_and", "bitwise_or", "bitwise_not", "log", "exp", "sqrt", "rsqrt", "log2"),
        *("sigmoid", "pow", "logical_xor", "bitwise_xor"),
    }
)

# Those of them that a score may pass through.
SCORE_OPS: frozenset[Any] = POINTWISE - frozenset(_TRANSCENDENTAL)
