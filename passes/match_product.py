"""Attentions by hand: a product of Q and K, a softmax, a product with V.

Is one operand of a product a softmax's result (anchors.py)? Then it is a product with V; its
scores are followed up to the product of Q and K (contraction.py), the axes of both are sorted into
those of attention (axes.py), the element of a score is read as an expression (element.py) and
parted into scale, score and mask (score.py).
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.alike import Matched
from adaattn_compiler.passes.anchors import Probabilities, probabilities_below
from adaattn_compiler.passes.assemble import (
    Loops,
    assembled,
    canonical_axes,
    key_in_every_row,
    module_path,
    operand_targets,
)
from adaattn_compiler.passes.axes import AttentionAxes
from adaattn_compiler.passes.canonical_view import CanonicalView, call_name, meta_of
from adaattn_compiler.passes.contraction import (
    Contraction,
    contraction_at,
    is_contraction,
    obstacle,
    products_below,
    scores_accesses,
)
from adaattn_compiler.passes.expressions import as_number
from adaattn_compiler.passes.index_map import ONE, Axis, Index, NotAffine
from adaattn_compiler.passes.operands import chosen_operand, operand_chain
from adaattn_compiler.passes.score import RAW, ScoreParts, score_parts, without_row_statistics
from adaattn_compiler.passes.sides import SideReader
from adaattn_compiler.passes.site import Refused, Site
from adaattn_compiler.passes.views import Access
from adaattn_compiler.predicates import normalized
from adaattn_compiler.spec import EmptyRow, Refusal, Where, k


def product_site(view: CanonicalView, node: fx.Node, matched: Matched) -> Site | Refused | None:
    """The site whose product with V this node is; None where it is no such product.

    matched: the sites found before, of which one may be alike.
    """
    shape = meta_of(node).shape
    batch = [Axis(f"i{d}", size) for d, size in enumerate(shape[:-2])]
    row, column = Axis("r", shape[-2]), Axis("c", shape[-1])
    index = tuple(Index.of_axis(axis) for axis in (*batch, row, column))
    product = contraction_at(Access(node, index), "n")
    if product is None:
        return None
    for weights, values, query, value in (
        (product.lhs, product.rhs, row, column),
        (product.rhs, product.lhs, column, row),
    ):
        try:
            below = probabilities_below(weights)
        except (Refusal, NotAffine):
            continue
        if below is None:
            continue
        softmax = below.softmax
        if softmax.node not in view.live or not _runs_over(
            softmax.scores, softmax.dim, product.over
        ):
            continue
        if obstacle(softmax.scores.node) is None:
            continue  # no product above: weights of another kind
        if product.addend is not None:
            reason = "a product with V that something is added to in the same call"
            return Refused(module_path(softmax.node), softmax.spelling, reason, softmax.node)
        loops = Loops(batch[0] if batch else Axis("i0", ONE), query, product.over, value)
        region = matched.region(node)
        site = matched.alike(region)
        if site is not None:
            return site
        try:
            site = _manual_site(view, node, index, below, values, loops)
            matched.add(region, site)
            return site
        except (Refusal, NotAffine) as refusal:
            path = module_path(softmax.node)
            return Refused(path, softmax.spelling, str(refusal), softmax.node)
    return None


def _runs_over(scores: Access, dim: int, key: Axis) -> bool:
    """Whether the softmax normalizes over the axis that the product sums."""
    return key in scores.index[dim].axes and not any(
        key in position.axes for d, position in enumerate(scores.index) if d != dim
    )


def _manual_site(
    view: CanonicalView,
    node: fx.Node,
    index: tuple[Index, ...],
    below: Probabilities,
    values: Access,
    loops: Loops,
) -> Site:
    softmax = below.softmax
    if softmax.scores.index[softmax.dim] != Index.of_axis(loops.key):
        raise Refusal("a softmax over more than the keys, not from their first", softmax.node)
    refusal: Exception | None = None
    for read_at, scores in products_below(softmax.scores, "d"):
        try:
            return _site_of(view, node, index, below, values, loops, read_at, scores)
        except (Refusal, NotAffine) as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    between = obstacle(softmax.scores.node)
    if between is None or is_contraction(between):
        raise Refusal("scores in a layout that is not understood", softmax.node)
    raise Refusal(
        f"{call_name(between)} between the product and softmax is not understood", between
    )


def _site_of(
    view: CanonicalView,
    node: fx.Node,
    index: tuple[Index, ...],
    below: Probabilities,
    values: Access,
    loops: Loops,
    read_at: Access,
    product: Contraction,
) -> Site:
    q_at, k_at = _query_and_key(product, loops)
    chains = [operand_chain(view, access) for access in (q_at, k_at, values)]
    chains[2] = tuple(link for link in chains[2] if link.factor == 1)
    softmax = below.softmax
    visited = scores_accesses(softmax.scores, product_node=read_at.node)
    axes = canonical_axes(loops, chains, visited, read_at.node)
    targets = operand_targets(axes, product.over, loops.value)
    (query, q_factor), (key, k_factor), (value, _) = (
        chosen_operand(chain, axes, target) for chain, target in zip(chains, targets, strict=True)
    )
    reader = SideReader(view, axes, read_at.node, product)
    scores = Access(softmax.scores.node, tuple(axes.renamed(p) for p in softmax.scores.index))
    element = as_number(reader.read(scores))
    dtype = _narrowest(meta_of(scores.node).dtype, meta_of(read_at.node).dtype)
    parts = score_parts(element, dtype, softmax.zero_rows, key_in_every_row(axes))
    parts = _zeroed(parts, below, reader, axes)
    sink = _sink(reader, scores, softmax.dim, loops.key, parts.row_terms)
    return assembled(
        parts,
        reader,
        axes,
        (query, key, value),
        float(q_factor * k_factor),
        sink=sink,
        zero_rows=softmax.zero_rows,
        dropout_p=below.dropout_p,
        spelling=softmax.spelling,
        anchor=softmax.node,
        output=node,
        result=index,
        inner=product.over,
        value_axis=loops.value,
        scores=read_at.node,
        noise=below.noise,
    )


def _narrowest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype with the least range."""
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).max)


def _query_and_key(product: Contraction, loops: Loops) -> tuple[Access, Access]:
    """The operand that the key axis runs through is K; the other must not depend on it."""
    sides = [
        any(loops.key in position.axes for position in access.index)
        for access in (product.lhs, product.rhs)
    ]
    if sides == [False, True]:
        pair = (product.lhs, product.rhs)
    elif sides == [True, False]:
        pair = (product.rhs, product.lhs)
    else:
        raise Refusal("a product in which not just one operand depends on the key")
    whole = Index.of_axis(loops.key)
    if whole not in pair[1].index:
        raise Refusal("a product whose keys are read in another order", pair[1].node)
    if any(loops.query in position.axes for position in pair[1].index):
        raise Refusal("keys that depend on the query", pair[1].node)
    return pair


def _zeroed(
    parts: ScoreParts, below: Probabilities, reader: SideReader, axes: AttentionAxes
) -> ScoreParts:
    """Probabilities set to zero after the softmax: only where the mask has them out anyway."""
    for access in below.zeroed_where:
        renamed = Access(access.node, tuple(axes.renamed(p) for p in access.index))
        condition = normalized(sympy.Not(reader.condition(renamed)))
        if condition != normalized(parts.mask):
            raise Refusal("probabilities masked after the softmax, unlike the scores", access.node)
        parts = replace(parts, empty_row=EmptyRow.ZERO)
    return parts


def _sink(
    reader: SideReader, scores: Access, dim: int, key: Axis, row_terms: sympy.Expr
) -> sympy.Expr | None:
    """The score of the one column beside the keys, where the softmax has one.

    row_terms: what was dropped from the scores; it must be in the sink's too.
    """
    width = meta_of(scores.node).shape[dim]
    extra = sympy.expand(width - key.size)
    if extra == 0:
        return None
    if extra != 1:
        raise Refusal("a softmax over columns that are no keys", scores.node)
    at = (*scores.index[:dim], Index.of_constant(key.size), *scores.index[dim + 1 :])
    sink = as_number(reader.read(Access(scores.node, at)))
    if sink.has(RAW) or sink.has(k) or sink.has(Where):
        raise Refusal("a column beside the keys that is not a sink", scores.node)
    sink, theirs = without_row_statistics(sink)
    if theirs != row_terms:
        raise Refusal("a maximum subtracted from the scores and not from their sink", scores.node)
    return sink
