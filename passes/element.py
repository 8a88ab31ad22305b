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

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.buffers import as_expression
from adaattn_compiler.passes.canonical_view import CanonicalView, getitem, meta_of
from adaattn_compiler.passes.element_ops import READERS, item_element
from adaattn_compiler.passes.expressions import (
    Trunc,
    Unreadable,
    as_condition,
    as_number,
    holds_data,
    holds_integers,
    lifted,
    may_wrap,
    narrows,
    number_of,
    settled,
)
from adaattn_compiler.passes.index_map import Axis, Index, NotAffine
from adaattn_compiler.passes.views import Access, broadcast_access, input_access
from adaattn_compiler.spec import POSITIONS, Load, Refusal


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
            self.view.deadline.check()
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
            dtype = meta_of(access.node).dtype
            element = settled(self._understood(access), dtype)
            return self.load(access) if may_wrap(element, dtype) else element
        except (NotAffine, Unreadable, Refusal):
            return self.load(access)

    def _understood(self, access: Access) -> Any:
        below = self._below(access)
        if below is not None:
            return self._converted(access.node, below)
        if access.node.target is getitem:
            return item_element(self, access, {})
        reader = READERS.get(access.node.target)
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
            if access.node.target in READERS:
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
        if narrows(source, target) and holds_data(element):
            raise Unreadable(f"data of {source} in {target}")
        if source.is_floating_point and not target.is_floating_point:
            return lifted(Trunc, element)
        if not holds_integers(target) and element.has(*POSITIONS):
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
