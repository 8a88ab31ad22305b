"""Attentions that are calls of scaled_dot_product_attention, matched as they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.alike import Matched
from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.assemble import (
    Loops,
    assembled,
    canonical_axes,
    key_in_every_row,
    module_path,
    operand_targets,
)
from adaattn_compiler.passes.axes import AttentionAxes
from adaattn_compiler.passes.canonical_view import CanonicalView, meta_of
from adaattn_compiler.passes.expressions import as_number
from adaattn_compiler.passes.index_map import ONE, Axis, Digit, Index, NotAffine
from adaattn_compiler.passes.operands import chosen_operand, operand_chain
from adaattn_compiler.passes.score import RAW, ScoreParts, score_parts
from adaattn_compiler.passes.sides import SideReader
from adaattn_compiler.passes.site import Refused, Site
from adaattn_compiler.passes.views import Access
from adaattn_compiler.spec import EmptyRow, Refusal, k, q

aten = torch.ops.aten


def sdpa_site(view: CanonicalView, node: fx.Node, matched: Matched) -> Site | Refused:
    """The site of an SDPA call. matched: the sites found before, of which one may be alike."""
    region = matched.region(node)
    site = matched.alike(region)
    if site is not None:
        return site
    try:
        site = _sdpa_site(view, node)
        matched.add(region, site)
        return site
    except (Refusal, NotAffine) as refusal:
        return Refused(module_path(node), "sdpa", str(refusal), node)


def _sdpa_site(view: CanonicalView, node: fx.Node) -> Site:
    """The site of a scaled_dot_product_attention call: (..., M, D), (..., N, D), (..., N, E)."""
    named = arguments(node)
    shapes = [meta_of(named[name]).shape for name in ("query", "key", "value")]
    out = meta_of(node).shape
    if len(out) < 2 or any(len(shape) != len(out) for shape in shapes):
        raise Refusal("SDPA operands of different ranks", node)
    # All dimensions but the last two are one product axis, cut into its dimensions.
    lead = out[:-2]
    total = sympy.expand(sympy.Mul(*lead))
    batch = Axis("i0", total)
    query, value = Axis("r", out[-2]), Axis("c", out[-1])
    key, inner = Axis("n", shapes[1][-2]), Axis("d", shapes[0][-1])
    loops = Loops(batch, query, key, value)
    lead_index = _unfolded(batch, lead)
    q_at = Access(named["query"], (*lead_index, Index.of_axis(query), Index.of_axis(inner)))
    k_lead = _shared_heads(lead_index, lead, shapes[1][:-2], bool(named["enable_gqa"]), node)
    v_lead = _shared_heads(lead_index, lead, shapes[2][:-2], bool(named["enable_gqa"]), node)
    k_at = Access(named["key"], (*k_lead, Index.of_axis(key), Index.of_axis(inner)))
    v_at = Access(named["value"], (*v_lead, Index.of_axis(key), Index.of_axis(value)))
    chains = [operand_chain(view, access) for access in (q_at, k_at, v_at)]
    index = (*lead_index, Index.of_axis(query), Index.of_axis(value))
    scores_index = (*lead_index, Index.of_axis(query), Index.of_axis(key))
    axes = canonical_axes(loops, chains, [Access(node, scores_index)], node)
    q_target, k_target, v_target = operand_targets(axes, inner, value)
    operands = (
        chosen_operand([li for li in chains[0] if li.factor == 1], axes, q_target)[0],
        chosen_operand([li for li in chains[1] if li.factor == 1], axes, k_target)[0],
        chosen_operand([li for li in chains[2] if li.factor == 1], axes, v_target)[0],
    )
    reader = SideReader(view, axes, node, None)
    parts = _sdpa_parts(named, reader, axes, scores_index, inner, node)
    return assembled(
        parts,
        reader,
        axes,
        operands,
        1.0,
        sink=None,
        zero_rows=True,
        dropout_p=named["dropout_p"],
        spelling="sdpa",
        anchor=node,
        output=node,
        result=index,
        inner=inner,
        value_axis=value,
    )


def _unfolded(batch: Axis, sizes: Sequence[sympy.Expr]) -> tuple[Index, ...]:
    """The index of each leading dimension, as digits of one axis."""
    if len(sizes) == 1:
        return (Index.of_axis(batch),)
    index: list[Index] = []
    stride = ONE
    for size in reversed(sizes):
        index.append(Index() if size == 1 else Index(((Digit(batch, stride, size), ONE),)))
        stride = sympy.expand(stride * size)
    return tuple(reversed(index))


def _shared_heads(
    lead_index: tuple[Index, ...],
    lead: Sequence[sympy.Expr],
    sizes: Sequence[sympy.Expr],
    enable_gqa: bool,
    node: fx.Node,
) -> tuple[Index, ...]:
    """The leading index of K or V: broadcast, or by groups of query heads."""
    out: list[Index] = []
    for d, (position, ours, theirs) in enumerate(zip(lead_index, lead, sizes, strict=True)):
        if ours == theirs:
            out.append(position)
        elif theirs == 1:
            out.append(Index())
        elif enable_gqa and d == len(lead) - 1:
            ((digit, _),) = position.terms
            outer, _ = digit.split(sympy.cancel(ours / theirs))
            out.append(Index(((outer, ONE),)))
        else:
            raise Refusal("SDPA operands whose leading sizes do not fit", node)
    return tuple(out)


def _sdpa_parts(
    named: dict[str, Any],
    reader: SideReader,
    axes: AttentionAxes,
    scores_index: tuple[Index, ...],
    inner: Axis,
    node: fx.Node,
) -> ScoreParts:
    scale = named["scale"]
    if scale is None:
        if not inner.size.is_Integer:
            raise Refusal("a head dimension that is not a number", node)
        number: float = float(inner.size) ** -0.5
    else:
        if isinstance(scale, sympy.Expr) and not scale.is_number:
            raise Refusal("a scale that is not known when compiling", node)
        number = float(scale)
    mask = named["attn_mask"]
    element: Any = RAW
    keep: Any = sympy.true
    if mask is not None:
        if named["is_causal"]:
            raise Refusal("SDPA with both attn_mask and is_causal", node)
        renamed = tuple(axes.renamed(p) for p in scores_index)
        shape = meta_of(mask).shape
        out_shape = (*meta_of(node).shape[:-1], axes.key.size)
        offset = len(renamed) - len(shape)
        at = Access(
            mask,
            tuple(
                Index() if size == 1 and out_shape[offset + d] != 1 else renamed[offset + d]
                for d, size in enumerate(shape)
            ),
        )
        bias = reader.side(at)
        if meta_of(mask).dtype == torch.bool:
            keep = bias
        else:
            element = RAW + as_number(bias)
    if named["is_causal"]:
        keep = sympy.Ge(q, k)
    dtype = meta_of(named["query"]).dtype
    parts = score_parts(element, dtype, True, key_in_every_row(axes))
    empty_row = EmptyRow.ZERO if keep != sympy.true else parts.empty_row
    return replace(
        parts, scale=parts.scale * number, mask=sympy.And(parts.mask, keep), empty_row=empty_row
    )
