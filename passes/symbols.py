"""Shape symbols: what they were when captured, and which must be numbers or the same.

Under `dynamic=True` every size of an input is a symbol, heads and head dimension with the rest, and
SDPA's fake kernel does not say that K and V are of one length. A kernel is made for a number of
heads and a head dimension. So these become guards, which hold whenever the call is the same model:
another length compiles nothing anew, another number of heads does. A size that the user has marked
as dynamic is left alone.

All that is asked of torch's ShapeEnv is asked here (torch 2.11 and 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.relevance import SDPA
from adaattn_compiler.passes.site import Refused, Site


def size_hint(size: sympy.Expr, fake: Any) -> Any:
    """The value that a symbolic size or number had when it was captured; adds no guard.

    fake: a tensor whose shape environment knows it. ValueError where that was not known.
    """
    if not size.free_symbols:
        return int(size) if size.is_Integer else float(size)
    shape_env = fake.fake_mode.shape_env
    values = getattr(shape_env, "backed_var_to_val", None)
    if values is None:  # torch 2.11
        values = shape_env.var_to_val
    value = size.subs(values)
    if value.free_symbols:
        raise ValueError(f"{size} was not known when it was captured")
    return int(value) if value.is_Integer else float(value)


def settle_sdpa(graph: fx.Graph) -> None:
    """Guards for SDPA calls: K and V of one length, heads and head dimensions that are numbers."""
    for node in graph.nodes:
        if node.target not in SDPA:
            continue
        shapes = [_shape(value) for value in _operands(node)]
        if len(shapes) < 3 or any(shape is None or len(shape) < 2 for shape in shapes):
            continue
        q, k, v = (tuple(shape or ()) for shape in shapes)
        _settle_equal(k[-2], v[-2])
        fixed = (q[-1], k[-1], v[-1], *(shape[-3] for shape in (q, k, v) if len(shape) > 3))
        settle(graph, _symbols(fixed))


def symbols_to_settle(found: Sequence[Site | Refused]) -> set[sympy.Symbol]:
    """The symbols in heads and head dimensions of sites, other than those of lengths."""
    wanted: set[sympy.Symbol] = set()
    for site in found:
        if isinstance(site, Site):
            fixed, free = (
                set().union(*(site.sizes[name].free_symbols for name in names))
                for names in (("H", "G", "D", "E"), ("B", "M", "N"))
            )
            wanted |= fixed - free
    return wanted


def settle(graph: fx.Graph, symbols: set[sympy.Symbol]) -> bool:
    """Make numbers of those symbols that the user has not marked; whether any became one."""
    settled = False
    if symbols:
        for size in _dynamic_sizes(graph):
            (symbol, *others) = size.node.expr.free_symbols or (None,)
            if symbol in symbols and not others and symbol not in _marked(size):
                int(size)
                settled = True
    return settled


def settle_range(size: sympy.Expr, low: int, high: int, fake: Any) -> bool:
    """Whether a size is from low to high; a guard, where it is a symbol, that it stays so or stays
    outside.

    fake: a tensor whose shape environment knows it.
    """
    hint = size_hint(size, fake)
    if size.is_Integer:
        return bool(low <= hint <= high)
    symbol = fake.fake_mode.shape_env.create_symintnode(size, hint=hint)
    return bool(symbol >= low) and bool(symbol <= high)


def _operands(node: fx.Node) -> list[Any]:
    named = [node.kwargs[name] for name in ("query", "key", "value") if name in node.kwargs]
    return [*node.args[:3], *named]


def _shape(value: Any) -> tuple[Any, ...] | None:
    fake = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return tuple(fake.shape) if isinstance(fake, torch.Tensor) else None


def _symbols(sizes: Iterable[Any]) -> set[sympy.Symbol]:
    return {
        symbol
        for size in sizes
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }


def _settle_equal(first: Any, second: Any) -> None:
    """Two lengths that were equal when captured, and whose call fails where they are not."""
    for size in (first, second):
        if not isinstance(size, torch.SymInt) or size.node.hint is None:
            return
    if first.node.expr != second.node.expr and first.node.hint == second.node.hint:
        bool(first == second)


def _dynamic_sizes(graph: fx.Graph) -> Iterator[torch.SymInt]:
    for node in graph.nodes:
        for size in _shape(node) or ():
            if isinstance(size, torch.SymInt) and size.node.hint is not None:
                yield size


def _marked(size: torch.SymInt) -> set[sympy.Symbol]:
    """The symbols of sizes that the user has marked as dynamic, which must not become numbers."""
    marked: set[sympy.Symbol] = set()
    for tracked in size.node.shape_env.tracked_fakes or ():
        context = getattr(tracked, "symbolic_context", None)
        constraints = getattr(context, "constraint_sizes", None) or ()
        shape = getattr(tracked.fake, "shape", ())
        for dimension, constraint in zip(shape, constraints, strict=False):
            if constraint is not None and not constraint.warn_only:  # else torch marked it
                marked |= _symbols((dimension,))
    return marked
