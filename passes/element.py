"""One element of a tensor as a sympy expression of its position.

`ElementReader.read(access)` follows the canonical view upward from a tensor and says what its
element at that index is: `q >= k` for a causal mask built from `arange`, `Where(q >= k, 0, -oo)`
for one that is added, `Load(slopes, h) * (k - q)` for ALiBi. Views are index arithmetic, pointwise
ops are sympy, and what is not understood (or holds data) is a `Load` of that tensor, which is
always exact: nothing is guessed, at worst nothing is gained.

Integer and boolean arithmetic is exact. Floating-point arithmetic is read as real arithmetic;
whoever must have the bits (a bucket boundary computed in float32) evaluates the graph instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import fx

from adaattn_compiler.passes.arguments import arguments, wrapped_dim
from adaattn_compiler.passes.buffers import as_expression
from adaattn_compiler.passes.canonicalize import CanonicalView, getitem, meta_of
from adaattn_compiler.passes.index_map import Axis, Index, NotAffine, is_less
from adaattn_compiler.passes.views import Access, broadcast_access, input_access, paddings
from adaattn_compiler.spec import POSITIONS, Load, Refusal, Where, k, q

aten = torch.ops.aten


class RowStatistic(sympy.Function):  # type: ignore[misc]
    """A value that is the same for every key of a row (its max, its log-sum-exp)."""

    is_real = True
    is_number = False


class Trunc(sympy.Function):  # type: ignore[misc]
    """Rounding toward zero, as a cast from float to integer does."""

    is_integer = True

    @classmethod
    def eval(cls, value: Any) -> Any:
        if value.is_integer:
            return value
        if value.is_Number and value.is_finite:
            return sympy.Integer(int(value))
        return None


# How the functions of `_inexact` begin.
INEXACT = "inexact_"


class Unreadable(Exception):
    """This op has no expression; its result is loaded instead."""


class ElementReader:
    """Reads elements of one canonical view, each once.

    axes: the expression of each loop axis. stops: nodes that are not looked into, with what
    stands for their element (the QK contraction, while the scores around it are read).
    """

    def __init__(
        self,
        view: CanonicalView,
        axes: Mapping[Axis, sympy.Expr],
        stops: Mapping[fx.Node, sympy.Expr] | None = None,
        row_axis: Axis | None = None,
    ) -> None:
        self.view = view
        self.axes = axes
        self.stops = stops or {}
        self.row_axis = row_axis
        self.loaded: dict[str, fx.Node] = {}
        self.assumed: set[int] = set()
        self._memo: dict[Access, Any] = {}

    def read(self, access: Access) -> Any:
        """The element: a sympy Boolean for boolean tensors, else a sympy expression."""
        if access not in self._memo:
            self._memo[access] = self._read(access)
        return self._memo[access]

    def number(self, access: Access) -> sympy.Expr:
        """The element as a number (booleans as 0 and 1)."""
        return as_number(self.read(access))

    def condition(self, access: Access) -> Boolean:
        """The element as a condition (numbers hold where they are not 0)."""
        return as_condition(self.read(access))

    def load(self, access: Access) -> Any:
        """The element as read from the tensor itself."""
        node = access.node
        constant = self.view.constants.get(node)
        if constant is not None and constant.numel() == 1:
            value = constant.item()
            return (
                sympy.true if value is True else sympy.false if value is False else number_of(value)
            )
        if node in self.view.buffers:
            element = self._buffer_element(access)
            if element is not None:
                return element
        if self.is_partial(access):
            raise Unreadable("a part of a tensor, read as if it were all")
        self.loaded[node.name] = node
        index = [position.expression(self.axes) for position in access.index]
        element = Load(sympy.Symbol(node.name), *index)
        return sympy.Ne(element, 0) if meta_of(node).dtype == torch.bool else element

    def is_partial(self, access: Access) -> bool:
        """Whether a position runs through a part of a dimension only: a `Load` means all of it."""
        return any(
            position.expression(self.axes) in POSITIONS
            and sympy.expand(position.largest + 1 - size) != 0
            for position, size in zip(access.index, meta_of(access.node).shape, strict=True)
        )

    def _buffer_element(self, access: Access) -> Any | None:
        """The element of a module's buffer whose values are those of a mask; else None."""
        position, value = self.view.buffers[access.node]
        if len(access.index) < 2:
            return None
        row, column = (at.expression(self.axes) for at in access.index[-2:])
        element = as_expression(value, row, column)
        if element is not None:
            self.assumed.add(position)
        return element

    def _read(self, access: Access) -> Any:
        if access.node in self.stops:
            return self.stops[access.node]
        try:
            return settled(self._understood(access), meta_of(access.node).dtype)
        except (NotAffine, Unreadable, Refusal):
            return self.load(access)

    def _understood(self, access: Access) -> Any:
        below = self._below(access)
        if below is not None:
            return self._converted(access.node, below)
        if access.node.target is getitem:
            return _item(self, access, {})
        reader = _READERS.get(access.node.target)
        if reader is None:
            return self.load(access)
        element = reader(self, access, arguments(access.node))
        # A product of booleans is one, though it was multiplied as numbers.
        return as_condition(element) if meta_of(access.node).dtype == torch.bool else element

    def is_row_statistic(self, access: Access) -> bool:
        """Whether a reduction of something is the same for every key of a row of scores."""
        return not any(self.row_axis in position.axes for position in access.index)

    def _below(self, access: Access) -> Access | None:
        """The same element in a view's input; a seam of a `cat` is left to its reader."""
        try:
            return input_access(access)
        except NotAffine:
            if access.node.target in _READERS:
                return None
            raise

    def _converted(self, node: fx.Node, below: Access) -> Any:
        """The element of a view's input, converted where the view also changes the dtype."""
        element = self.read(below)
        source, target = meta_of(below.node).dtype, meta_of(node).dtype
        if source == target or (source.is_floating_point and target.is_floating_point):
            return element
        if target == torch.bool:
            return as_condition(element)
        element = as_number(element)
        if source.is_floating_point and not target.is_floating_point:
            return lifted(Trunc, element)
        if not _holds_integers(target) and element.has(*POSITIONS):
            raise Unreadable(f"positions rounded to {target}")
        return element

    def index_of(self, element: sympy.Expr) -> Index:
        """A position computed by the graph as an index: over axes where it is linear in them."""
        index, rest = Index(), sympy.expand(element)
        for axis, name in self.axes.items():
            slope = rest.coeff(name, 1)
            if slope != 0 and not slope.free_symbols:
                index = index.plus(Index.of_axis(axis).scaled(slope))
                rest = sympy.expand(rest - slope * name)
        return index.plus(Index.of_constant(rest))

    def operand(self, access: Access, value: Any) -> Any:
        """An operand of a pointwise op: a tensor broadcast to the result, or a number."""
        if isinstance(value, fx.Node):
            return self.read(broadcast_access(access, value))
        return number_of(value)


def is_condition(element: Any) -> bool:
    """Whether an element is a truth value (sympy counts every symbol among its Booleans)."""
    return isinstance(element, Boolean) and not isinstance(element, sympy.Symbol)


def as_number(element: Any) -> sympy.Expr:
    """A condition as 1 or 0; a number as it is."""
    if is_condition(element):
        return Where(element, sympy.Integer(1), sympy.Integer(0))
    return element


def as_condition(element: Any) -> Boolean:
    """A number as the condition that it is not 0; a condition as it is."""
    if is_condition(element):
        return element
    if isinstance(element, Where):
        condition, x, y = element.args
        return chosen_condition(condition, as_condition(x), as_condition(y))
    return sympy.Ne(element, 0)


def lifted(function: Callable[..., Any], *operands: Any) -> Any:
    """function(*operands), moved inside a Where when the other operands are plain numbers.

    `(1 - Where(c, 1, 0)) * m` becomes `Where(c, 0, m)`, the form that masks are recognized in.
    """
    conditions = {operand.args[0] for operand in operands if isinstance(operand, Where)}
    one = len(conditions) == 1 and all(isinstance(o, Where) or _is_plain(o) for o in operands)
    if not one and not (conditions and all(_is_choice_of_numbers(o) for o in operands)):
        return function(*operands)
    condition = min(conditions, key=sympy.default_sort_key)
    yes, no = (
        lifted(function, *(_branch(operand, condition, side) for operand in operands))
        for side in (1, 2)
    )
    if is_condition(yes) and is_condition(no):
        return chosen_condition(condition, yes, no)
    return Where(condition, as_number(yes), as_number(no))


def _branch(operand: Any, condition: Boolean, side: int) -> Any:
    """What an operand is where the condition holds (side 1) or does not (side 2)."""
    if isinstance(operand, Where):
        if operand.args[0] == condition:
            return _branch(operand.args[side], condition, side)
        return Where(operand.args[0], *(_branch(o, condition, side) for o in operand.args[1:]))
    return operand


def _is_plain(operand: Any) -> bool:
    return isinstance(operand, sympy.Basic) and not operand.free_symbols and not operand.has(Load)


def _is_choice_of_numbers(operand: Any, depth: int = 3) -> bool:
    """Whether an operand is one of few numbers, by conditions."""
    if isinstance(operand, Where) and depth > 0:
        return all(_is_choice_of_numbers(o, depth - 1) for o in operand.args[1:])
    return isinstance(operand, sympy.Number) or operand in (sympy.oo, -sympy.oo)


def chosen_condition(condition: Boolean, yes: Boolean, no: Boolean) -> Boolean:
    """`condition ? yes : no` without what is said twice."""
    if no == sympy.false:
        return sympy.And(condition, yes)
    if yes == sympy.true:
        return sympy.Or(condition, no)
    if yes == sympy.false:
        return sympy.And(sympy.Not(condition), no)
    if no == sympy.true:
        return sympy.Or(sympy.Not(condition), yes)
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def settled(element: Any, dtype: torch.dtype) -> Any:
    """The element as its dtype has it: numbers past its range are infinite, none is NaN.

    A choice among summands keeps its numbers inside: `2 * Where(c, 0, v)` is `Where(c, 0, 2 * v)`.
    """
    if is_condition(element) or not dtype.is_floating_point:
        return element
    if element.has(sympy.nan, sympy.zoo):
        raise Unreadable("NaN")
    if isinstance(element, sympy.Add):
        return sympy.Add(*(settled(term, dtype) for term in element.args))
    if isinstance(element, sympy.Mul) and any(isinstance(f, Where) for f in element.args):
        element = lifted(sympy.Mul, *element.args)
        if isinstance(element, sympy.Mul):
            return element
    if isinstance(element, Where):
        condition, x, y = element.args
        return Where(condition, settled(x, dtype), settled(y, dtype))
    if element.is_Number and element.is_finite and abs(element) > torch.finfo(dtype).max:
        return sympy.oo * sympy.sign(element)
    return element


def _holds_integers(dtype: torch.dtype) -> bool:
    """Whether every position there can be (below 2**24) is a number of this dtype."""
    return dtype not in (torch.float16, torch.bfloat16)


def number_of(value: Any) -> Any:
    """A plain or symbolic number (or truth value) of a call as an expression."""
    if isinstance(value, sympy.Expr):
        return value
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise Unreadable("NaN")
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return (
            sympy.Integer(int(value))
            if value.is_integer() and abs(value) < 2**53
            else sympy.Float(value)
        )
    raise Unreadable(str(value))


# -- readers, one for each kind of op ----------------------------------------------------------

_Reader = Callable[[ElementReader, Access, dict[str, Any]], Any]


def _pointwise(names: tuple[str, ...], function: Callable[..., Any]) -> _Reader:
    def read(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
        operands = (as_number(reader.operand(access, named[name])) for name in names)
        return lifted(function, *operands)

    return read


def _added(sign: int) -> _Reader:
    def read(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
        x = as_number(reader.operand(access, named["self"]))
        y = as_number(reader.operand(access, named["other"]))
        alpha = as_number(number_of(named.get("alpha", 1)))
        return lifted(lambda a, c: a + sign * alpha * c, x, y)

    return read


def _rsub(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    x = as_number(reader.operand(access, named["self"]))
    y = as_number(reader.operand(access, named["other"]))
    return lifted(lambda a, c: c - as_number(number_of(named.get("alpha", 1))) * a, x, y)


def _multiplied(x: Any, y: Any) -> Any:
    """x * y, with 0 * inf left unread (it is NaN)."""
    product = x * y
    if product is sympy.nan:
        raise Unreadable("0 * inf")
    return product


def _divided(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
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
    def read(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
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

    def read(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
        bitwise = "bitwise" in str(access.node.target)
        if bitwise and meta_of(access.node).dtype != torch.bool:
            raise Unreadable("bitwise arithmetic on integers")
        return function(*(as_condition(reader.operand(access, named[name])) for name in names))

    return read


def _where(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    condition = as_condition(reader.operand(access, named["condition"]))
    x, y = (reader.operand(access, named[name]) for name in ("self", "other"))
    return _chosen(condition, x, y)


def _masked_fill(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    condition = as_condition(reader.operand(access, named["mask"]))
    return _chosen(
        condition, reader.operand(access, named["value"]), reader.operand(access, named["self"])
    )


def _chosen(condition: Boolean, x: Any, y: Any) -> Any:
    if is_condition(x) and is_condition(y):
        return chosen_condition(condition, x, y)
    return Where(condition, as_number(x), as_number(y))


def _clamped(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    x = as_number(reader.operand(access, named["self"]))
    if named.get("min") is not None:
        x = lifted(sympy.Max, x, as_number(reader.operand(access, named["min"])))
    if named.get("max") is not None:
        x = lifted(sympy.Min, x, as_number(reader.operand(access, named["max"])))
    return x


def _filled(value: str | int | bool | float) -> _Reader:
    """A tensor of one value: that of a named argument, or the constant itself."""

    def read(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
        element = (
            reader.operand(Access(access.node, access.index), named[value])
            if isinstance(value, str)
            else number_of(value)
        )
        if meta_of(access.node).dtype == torch.bool:
            return as_condition(element)
        return as_number(element)

    return read


def _arange(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    if not _holds_integers(meta_of(access.node).dtype):
        raise Unreadable("positions that are rounded")
    start = as_number(number_of(named.get("start", 0)))
    step = as_number(number_of(named.get("step", 1)))
    return start + step * access.index[0].expression(reader.axes)


def _triangle(keeps: Callable[[Any, Any], Any]) -> _Reader:
    def read(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
        row, column = (position.expression(reader.axes) for position in access.index[-2:])
        inside = keeps(column - row, as_number(number_of(named["diagonal"])))
        return (
            _chosen(inside, reader.read(Access(named["self"], access.index)), sympy.Integer(0))
            if (meta_of(access.node).dtype != torch.bool)
            else sympy.And(inside, reader.condition(Access(named["self"], access.index)))
        )

    return read


def _indexed(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
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


def _embedding(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    row = reader.number(Access(named["indices"], access.index[:-1]))
    return reader.load(Access(named["weight"], (Index.of_constant(row), access.index[-1])))


def _index_select(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    dim = wrapped_dim(named["dim"], len(access.index))
    row = reader.number(Access(named["index"], (access.index[dim],)))
    index = (*access.index[:dim], Index.of_constant(row), *access.index[dim + 1 :])
    return reader.read(Access(named["self"], index))


def _row_statistic(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    """A maximum or log-sum-exp of scores along their keys (or more): the same for all of a row."""
    if not reader.is_row_statistic(access):
        raise Unreadable("a reduction that is not the same for every key")
    return RowStatistic(
        sympy.Symbol(access.node.name), *(p.expression(reader.axes) for p in access.index)
    )


def _item(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    """The values of `max(dim)`; items of other results are loaded."""
    parent, position = access.node.args
    if isinstance(parent, fx.Node) and parent.target is aten.max.dim and position == 0:
        return _row_statistic(reader, Access(parent, access.index), arguments(parent))
    raise Unreadable("an item of a result")


def _cumsum(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
    """The running sum of a constant; of anything else it is loaded."""
    dim = wrapped_dim(named["dim"], len(access.index))
    element = reader.number(Access(named["self"], access.index))
    if not element.is_number:
        raise Unreadable("a running sum of data")
    return element * (access.index[dim].expression(reader.axes) + 1)


def _cat(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
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


def _padded(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
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

    def read(reader: ElementReader, access: Access, named: dict[str, Any]) -> Any:
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


def is_exact(element: Any) -> bool:
    """Whether an expression can be computed anew, in any order, with the same result in meaning.

    In a condition, what is computed of positions must be integers throughout: `k / 3.0 >= 2.0` may
    be decided by a rounding. (Quotients of integers may be floored: they are too far from the next
    integer for that.)
    """
    if any(str(f.func).startswith(INEXACT) for f in element.atoms(sympy.Function)):
        return False
    if element.has(Trunc, RowStatistic):
        return False
    return all(
        _is_of_integers(relation) for relation in element.atoms(Relational) if relation.has(q, k)
    )


def _is_of_integers(relation: Any) -> bool:
    if relation.has(sympy.Float):
        return False
    if any(not f.args[0].as_numer_denom()[1].is_Integer for f in relation.atoms(sympy.floor)):
        return False
    number = sympy.Dummy(integer=True)
    whole = relation.replace(Load, lambda *_: number)
    return all(side.is_integer for side in (whole.args or ()))


_BINARY = ("self", "other")
_READERS: dict[Any, _Reader] = {}


def _register(reader: _Reader, *targets: Any) -> None:
    for target in targets:
        _READERS[target] = reader


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
    for target in _READERS
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
