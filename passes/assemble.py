"""From what was read of an attention to its site: axes, operands, spec.

Both spellings, products by hand and SDPA calls, end here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from adaattn_compiler.passes.axes import AttentionAxes, attention_axes
from adaattn_compiler.passes.canonical_view import origin_of
from adaattn_compiler.passes.contraction import Spine
from adaattn_compiler.passes.expressions import RowStatistic
from adaattn_compiler.passes.index_map import Axis, Digit, Index, NotAffine
from adaattn_compiler.passes.lone_axis import Layouts
from adaattn_compiler.passes.operands import Link
from adaattn_compiler.passes.score import ScoreParts
from adaattn_compiler.passes.sides import SideReader
from adaattn_compiler.passes.site import Site
from adaattn_compiler.passes.views import Access
from adaattn_compiler.predicates import has_key_in_every_row, normalized, simplified
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, Refusal, S


def module_path(node: fx.Node) -> str:
    """The path of the module that a Dynamo node was called in, without the root's own name."""
    stack = origin_of(node).meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    root, _, rest = path.partition("].")
    return rest if root.startswith("L[") else "" if path.startswith("L[") else path


@dataclass(frozen=True)
class Loops:
    """The loop axes of the product with V."""

    batch: Axis
    query: Axis
    key: Axis
    value: Axis


def canonical_axes(
    loops: Loops,
    chains: Sequence[Sequence[Link]],
    visited: Sequence[Access],
    product_node: fx.Node,
) -> AttentionAxes:
    """The canonical axes, cut as finely as any operand or mask needs; coarser where that fails."""
    spine = Spine(product_node)
    linked = [[link.access for link in chain] for chain in chains]
    sides = [a for a in visited if not spine.holds(a.node)]
    layouts = Layouts(tuple(tuple(chain) for chain in linked), loops.batch, loops.query, loops.key)
    kv_digits = _digits([linked[1][0], linked[2][0], *linked[1][:1], *linked[2][:1]])
    kv_top = _digits([linked[1][-1], linked[2][-1]])
    attempts = [
        ([a for chain in linked for a in chain] + list(visited), kv_top),
        ([chain[0] for chain in linked] + list(visited), kv_digits),
        ([chain[0] for chain in linked], kv_digits),
    ]
    for accesses, kv in attempts:
        try:
            return attention_axes(
                loops.batch,
                loops.query,
                loops.key,
                _digits(accesses),
                kv,
                _digits(sides),
                layouts.is_batch,
            )
        except NotAffine:
            continue
    raise Refusal("axes that are cut in ways that do not fit together")


def _digits(accesses: Iterable[Access]) -> list[Digit]:
    return [digit for a in accesses for position in a.index for digit, _ in position.terms]


def operand_targets(
    axes: AttentionAxes, inner: Axis, value: Axis
) -> tuple[tuple[Index, ...], tuple[Index, ...], tuple[Index, ...]]:
    """The index of each dimension of Q [B,H,M,D], K [B,G,N,D] and V [B,G,N,E]."""
    batch, head, query, key = (
        Index.of_axis(axis) for axis in (axes.batch, axes.head, axes.query, axes.key)
    )
    of = Index.of_axis
    return (
        (batch, head, query, of(inner)),
        (batch, axes.kv_head, key, of(inner)),
        (batch, axes.kv_head, key, of(value)),
    )


def key_in_every_row(axes: AttentionAxes) -> Callable[[Any], bool]:
    facts = _facts(axes)
    sizes = {axes.query.size: M, axes.key.size: N}
    named = {size: name for size, name in sizes.items() if isinstance(size, sympy.Symbol)}
    return lambda mask: has_key_in_every_row(normalized(mask.xreplace(named)), facts)


def assembled(
    parts: ScoreParts,
    reader: SideReader,
    axes: AttentionAxes,
    operands: tuple[Any, Any, Any],
    operand_scale: float,
    *,
    sink: sympy.Expr | None,
    dropout_p: Any,
    zero_rows: bool,
    **fields: Any,
) -> Site:
    """The site, its expressions renumbered to its own operands and run-time integers."""
    readings = [(access, e) for access, e in reader.taken if not e.has(RowStatistic)]
    output = fields["output"]
    requires_grad = bool(output.meta["fake"].requires_grad)
    if parts.finite and reader.may_mask:
        raise Refusal("a mask of finite numbers beside a bias that may be as low", fields["anchor"])
    if requires_grad and reader.may_mask and not zero_rows:
        raise Refusal("a bias that may be a mask, in training (SDPA's gradient differs)", output)
    numbered = reader.numbered(
        (parts.score, normalized(parts.mask), sink, parts.factor, *(e for _, e in readings))
    )
    score, mask, sink, factor, *elements = numbered.expressions
    facts = _facts(axes)
    mask = simplified(mask, facts)
    if mask == sympy.false:
        raise Refusal("a mask that shuts out every key", fields["anchor"])
    if (score - S).is_number and score != S:
        raise Refusal("scores shifted by a constant", fields["anchor"])
    group = axes.group
    if not sympy.sympify(group).is_Integer:
        raise Refusal(
            f"{group} query heads for each key head, not a fixed number", fields["anchor"]
        )
    closing = None
    if any(numbered.operands[int(load.args[0])].kind == "float" for load in score.atoms(Load)):
        closing = EmptyRow.ZERO if zero_rows else EmptyRow.NAN
    spec = AttentionSpec(
        scale=parts.scale * operand_scale,
        score=score,
        mask=mask,
        empty_row=_empty_row(parts.empty_row, mask, sink, facts, closing),
        sink=sink,
        dropout_p=_probability(dropout_p),
        group=int(group),
        operands=numbered.operands,
        params=len(numbered.params),
    )
    anchor = fields["anchor"]
    return Site(
        name=module_path(anchor),
        spec=spec,
        axes=axes,
        q=operands[0],
        k=operands[1],
        v=operands[2],
        sides=numbered.sides,
        params=numbered.params,
        scale_factor=None if factor == 1 else factor,
        requires_grad=requires_grad,
        assumes=frozenset(reader.assumed),
        readings=tuple((access, e) for (access, _), e in zip(readings, elements, strict=True)),
        **fields,
    )


def _facts(axes: AttentionAxes) -> dict[Any, Any]:
    """The sizes M and N where they are known."""
    pairs = ((M, axes.query.size), (N, axes.key.size))
    return {symbol: size for symbol, size in pairs if size.is_Integer}


def _empty_row(
    stated: EmptyRow, mask: Any, sink: Any, facts: dict[Any, Any], closing: EmptyRow | None
) -> EmptyRow:
    """What an empty row yields, if there can be one; one with a sink attends to that alone.

    closing: what it yields where a bias that is data is -inf for all of its keys; None without one.
    """
    open_mask = has_key_in_every_row(mask, facts)
    if open_mask and closing is None:
        return EmptyRow.IMPOSSIBLE
    if sink is not None:
        return EmptyRow.ZERO
    return closing if open_mask and closing is not None else stated


def _probability(value: Any) -> float:
    """A dropout probability; a symbolic one only where its value is known."""
    if isinstance(value, sympy.Expr) and not value.is_number:
        raise Refusal("a dropout probability that is not known when compiling")
    return 0.0 if value is None else float(value)
