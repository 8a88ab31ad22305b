"""What enters the scores from the side: masks, biases, and how each is taken into the spec.

A side is read down to expressions of the position where that is exact and saves memory, as a
vector over the distance k - q where its element depends on nothing else, and as the tensor that
it is otherwise. So a spec never recomputes what only the graph computes to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx

from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.axes import AttentionAxes
from adaattn_compiler.passes.canonical_view import CanonicalView, meta_of, origin_of, owner_of
from adaattn_compiler.passes.contraction import Contraction, Spine
from adaattn_compiler.passes.element import ElementReader
from adaattn_compiler.passes.expressions import (
    RowStatistic,
    as_condition,
    as_number,
    is_condition,
    is_exact,
    number_of,
)
from adaattn_compiler.passes.index_map import NotAffine
from adaattn_compiler.passes.score import RAW, depends_on_distance_only, loads_are_thin
from adaattn_compiler.passes.site import SideTensor
from adaattn_compiler.passes.views import Access, broadcast_access, input_access
from adaattn_compiler.spec import (
    POSITIONS,
    Load,
    M,
    N,
    OperandSpec,
    Refusal,
    Where,
    h,
    k,
    param,
    q,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Numbered:
    """Expressions whose loads and run-time integers are numbered from 0, and what they are."""

    expressions: tuple[Any, ...]
    operands: tuple[OperandSpec, ...]
    sides: tuple[SideTensor, ...]
    params: tuple[sympy.Expr, ...]


class SideReader(ElementReader):
    """Reads the scores of one site, `product` (or the SDPA call) standing for q . k."""

    def __init__(
        self,
        view: CanonicalView,
        axes: AttentionAxes,
        product_node: fx.Node,
        product: Contraction | None,
    ) -> None:
        super().__init__(view, axes.names, row_axis=axes.key)
        self.attention_axes = axes
        self.product_node = product_node
        self.product = product
        self.distances: dict[str, SideTensor] = {}
        self.taken: list[tuple[Access, Any]] = []
        self.may_mask = False
        self.spine = Spine(product_node)

    def _read(self, access: Access) -> Any:
        if access.node is self.product_node and self.product is not None:
            return self._product()
        return super()._read(access)

    def _product(self) -> Any:
        assert self.product is not None
        alpha = _plain(self.product.alpha)
        element = alpha * RAW
        if self.product.addend is not None:
            addend = self.product.addend
            renamed = Access(
                addend.node, tuple(self.attention_axes.renamed(p) for p in addend.index)
            )
            element = element + _plain(self.product.beta) * as_number(self.side(renamed))
        return element

    def operand(self, access: Access, value: Any) -> Any:
        if (
            isinstance(value, fx.Node)
            and self.spine.holds(access.node)
            and not self.spine.holds(value)
        ):
            return self.side(broadcast_access(access, value))
        return super().operand(access, value)

    def side(self, access: Access) -> Any:
        """The element of a side tensor, in the form that the spec is to hold.

        What was read off (rather than loaded) is kept in `taken`, to be proven.
        """
        element = self._side(access)
        self.taken.append((access, element))
        return element

    def _side(self, access: Access) -> Any:
        access = self._peeled(access)
        element = self.read(access)
        if is_condition(element):
            if is_exact(element) and (loads_are_thin(element) or _is_one_load(element)):
                return element
        elif _is_nested_choice(element) and (parts := self._summands(access)) is not None:
            return parts
        elif not (element.has(q) and element.has(k)):
            if element.is_number or (isinstance(element, Where) and is_exact(element)):
                return element
        elif _is_safe(element):
            return element
        elif depends_on_distance_only(element) and not element.has(RowStatistic):
            return self._by_distance(access)
        parts = self._summands(access)
        if parts is not None:
            return parts
        chosen = self._choice(access)
        if chosen is not None:
            return chosen
        if not is_condition(element) and element.has(RowStatistic):
            return element
        self.may_mask = self.may_mask or self._may_mask(element)
        return self.load(access)

    def _summands(self, access: Access) -> sympy.Expr | None:
        """A sum of two sides, each taken for itself; None where it is no such sum."""
        if access.node.target is not aten.add.Tensor:
            return None
        named = arguments(access.node)
        both = [named[name] for name in ("self", "other")]
        if named["alpha"] != 1 or not all(isinstance(value, fx.Node) for value in both):
            return None
        return sympy.Add(*(as_number(self.side(broadcast_access(access, v))) for v in both))

    def _may_mask(self, element: Any) -> bool:
        """Whether a bias that is data may be as low as a mask: it has such a number in it, or is
        what the caller gives."""
        if any(abs(number) >= _AS_LOW_AS_A_MASK for number in element.atoms(sympy.Number)):
            return True
        nodes = [self.loaded.get(str(load.args[0])) for load in element.atoms(Load)]
        return any(node is not None and _is_given(node) for node in nodes)

    def _choice(self, access: Access) -> Any | None:
        """A bias under a mask: `where(mask, bias, fill)` with its parts taken each for itself."""
        named = arguments(access.node) if access.node.target in _CHOICES else {}
        if not named:
            return None
        mask, kept, other = _CHOICES[access.node.target]
        condition = as_condition(self.side(broadcast_access(access, named[mask])))
        if not (is_exact(condition) and loads_are_thin(condition)):
            return None
        parts = [
            self.side(broadcast_access(access, named[name]))
            if isinstance(named[name], fx.Node)
            else number_of(named[name])
            for name in (kept, other)
        ]
        x, y = (as_number(part) for part in parts)
        return Where(condition, x, y)

    def is_row_statistic(self, access: Access) -> bool:
        """Of other tensors than the scores a maximum is a tensor like any other."""
        return super().is_row_statistic(access) and self.spine.holds(access.node)

    def _peeled(self, access: Access) -> Access:
        """Through views and casts between floating-point types, which change no element."""
        try:
            below = input_access(access)
        except NotAffine:
            return access
        if below is None or self.is_partial(below):
            return access
        source, target = meta_of(below.node).dtype, meta_of(access.node).dtype
        same = source == target or (source.is_floating_point and target.is_floating_point)
        return self._peeled(below) if same else access

    def _by_distance(self, access: Access) -> Any:
        name = f"distance_{access.node.name}"
        self.distances[name] = SideTensor(access.node, access)
        return Load(sympy.Symbol(name), h, k - q + M - 1)

    def numbered(self, expressions: Sequence[Any]) -> Numbered:
        """The expressions with tensors and run-time integers by number."""
        tensors: list[sympy.Symbol] = []
        for expression in expressions:
            for load in _loads(expression):
                if load.args[0] not in tensors:
                    tensors.append(load.args[0])
        place = {name: sympy.Integer(i) for i, name in enumerate(tensors)}
        sides = tuple(self._side_tensor(str(name)) for name in tensors)
        operands = tuple(self._operand_spec(side) for side in sides)
        sizes, params = self._run_time_integers(expressions)
        return Numbered(
            tuple(None if e is None else _renumbered(e, place, sizes) for e in expressions),
            operands,
            sides,
            params,
        )

    def _side_tensor(self, name: str) -> SideTensor:
        return self.distances.get(name) or SideTensor(self.loaded[name])

    def _operand_spec(self, side: SideTensor) -> OperandSpec:
        meta = meta_of(side.node)
        kind = (
            "bool"
            if meta.dtype == torch.bool
            else ("float" if meta.dtype.is_floating_point else "int")
        )
        return OperandSpec(kind, 2 if side.distance is not None else meta.rank)

    def _run_time_integers(
        self, expressions: Sequence[Any]
    ) -> tuple[dict[sympy.Symbol, sympy.Expr], tuple[sympy.Expr, ...]]:
        """Shape symbols as M, N or a numbered run-time integer."""
        axes = self.attention_axes
        names: dict[sympy.Symbol, sympy.Expr] = {}
        if isinstance(axes.query.size, sympy.Symbol):
            names[axes.query.size] = M
        for symbol in sorted(axes.key.size.free_symbols, key=str):
            rest = sympy.expand(axes.key.size - symbol).subs(names)
            if symbol not in names and not rest.has(symbol) and rest.free_symbols <= {M}:
                names[symbol] = N - rest
                break
        params: list[sympy.Expr] = []
        known = {*POSITIONS, M, N, RAW, sympy.Symbol("S", real=True)}
        for expression in expressions:
            if expression is None:
                continue
            for symbol in sorted(expression.free_symbols - known - set(names), key=str):
                if symbol in {load.args[0] for load in _loads(expression)}:
                    continue
                if not symbol.is_integer and _is_in_condition(symbol, expression):
                    raise Refusal(f"a condition on {symbol}, a number that is not an integer")
                names[symbol] = param(len(params))
                params.append(symbol)
        return names, tuple(params)


# A bias with a number of this size in it is a mask as like as not.
_AS_LOW_AS_A_MASK = 1e8

# Ops that choose by a mask: the names of the mask, of what is taken where it holds, and where not.
_CHOICES: dict[Any, tuple[str, str, str]] = {
    aten.where.self: ("condition", "self", "other"),
    aten.masked_fill.Scalar: ("mask", "value", "self"),
    aten.masked_fill.Tensor: ("mask", "value", "self"),
}


def _is_nested_choice(element: Any) -> bool:
    """Whether an element chooses by one condition between numbers chosen by others."""
    return isinstance(element, Where) and any(isinstance(e, Where) for e in element.args[1:])


def _is_given(node: fx.Node) -> bool:
    """Whether a floating-point tensor is an input of the graph and no parameter."""
    if node.op != "placeholder" or not meta_of(node).dtype.is_floating_point:
        return False
    return owner_of(origin_of(node)) != "_parameters"


def _is_safe(element: Any) -> bool:
    """Whether floating-point arithmetic on an element may be done in another order.

    Choices between numbers, and tensor values times integers of the position (ALiBi), may; sums
    with large constants may not.
    """
    if isinstance(element, Where):
        return is_exact(element) and loads_are_thin(element)
    terms = sympy.Add.make_args(element)
    return all(_is_safe_term(sympy.expand(term)) for term in terms) and loads_are_thin(element)


def _is_safe_term(term: sympy.Expr) -> bool:
    if isinstance(term, Where):
        return is_exact(term)
    if isinstance(term, sympy.Add):
        return all(_is_safe_term(part) for part in term.args)
    factors = [f for f in sympy.Mul.make_args(term) if not isinstance(f, Load)]
    rest = sympy.Mul(*factors)
    small = all(abs(float(number)) < 1e6 for number in rest.atoms(sympy.Number))
    return small and is_exact(term) and not rest.has(Where, Load)


def _is_in_condition(symbol: sympy.Symbol, expression: Any) -> bool:
    """Whether an expression does more with a number than arithmetic."""
    return any(e.has(symbol) for e in expression.atoms(Relational, sympy.floor, sympy.Mod))


def _is_one_load(condition: Any) -> bool:
    """Whether a condition is a tensor's element, or that it is some number."""
    return (
        isinstance(condition, (sympy.Eq, sympy.Ne))
        and isinstance(condition.lhs, Load)
        and condition.rhs.is_Integer
    )


def _plain(value: Any) -> sympy.Expr:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value)
    return sympy.sympify(value)


def _loads(expression: Any) -> list[Load]:
    """The loads in an expression, in a fixed order."""
    if expression is None:
        return []
    return sorted(expression.atoms(Load), key=str)


def _renumbered(
    expression: Any, place: dict[sympy.Symbol, sympy.Integer], sizes: dict[Any, Any]
) -> Any:
    moved = expression.replace(
        lambda e: isinstance(e, Load) and e.args[0] in place,
        lambda e: Load(place[e.args[0]], *e.args[1:]),
    )
    return moved.xreplace(sizes) if sizes else moved
