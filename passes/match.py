"""Find every attention of a canonical view.

For each matrix product: is one operand a softmax's result (anchors.py)? Then it is a product with
V; its scores are followed up to the product of Q and K (contraction.py), the axes of both are
sorted into those of attention (axes.py), the element of a score is read as an expression
(element.py) and parted into scale, score and mask (score.py). SDPA calls are matched as they stand.

What cannot be understood is a `Refused`, with the reason and the node where it was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.anchors import (
    SOFTMAXES,
    Probabilities,
    probabilities_below,
)
from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.axes import AttentionAxes, attention_axes
from adaattn_compiler.passes.canonicalize import CanonicalView, meta_of, origin_of
from adaattn_compiler.passes.contraction import (
    Contraction,
    Spine,
    contraction_at,
    is_contraction,
    obstacle,
    products_below,
    scores_accesses,
)
from adaattn_compiler.passes.element import RowStatistic, as_number
from adaattn_compiler.passes.index_map import ONE, Axis, Digit, Index, NotAffine
from adaattn_compiler.passes.operands import Link, chosen_operand, operand_chain
from adaattn_compiler.passes.score import RAW, ScoreParts, score_parts, without_row_statistics
from adaattn_compiler.passes.sides import SideReader
from adaattn_compiler.passes.site import Site
from adaattn_compiler.passes.views import Access, is_view
from adaattn_compiler.predicates import has_key_in_every_row, normalized, simplified
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, Refusal, S, Where, k, q

aten = torch.ops.aten


@dataclass(frozen=True)
class Refused:
    """An attention that was seen and is left alone."""

    name: str
    spelling: str
    reason: str
    anchor: fx.Node


def match(view: CanonicalView) -> list[Site | Refused]:
    """The sites of a view, in graph order, with what was refused among them."""
    found: list[Site | Refused] = []
    anchors: set[fx.Node] = set()
    inside: dict[fx.Node, _Inside] = {}
    for node in view.graph.nodes:
        if node not in view.live:
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            found.append(_attempted(view, node))
        elif is_contraction(node):
            site = _product_site(view, node, inside)
            if site is not None and site.anchor not in anchors:
                anchors.add(site.anchor)
                found.append(site)
    found = _unshared(view, found, inside)
    found += _unmatched(view, anchors)
    order = {node: position for position, node in enumerate(view.graph.nodes)}
    found.sort(key=lambda item: order[item.anchor])
    return _numbered(found)


@dataclass(frozen=True)
class _Inside:
    """Nodes that a site computes anew, so that nothing else may need them, and why not."""

    scores: fx.Node
    noise: tuple[fx.Node, ...]


def _unshared(
    view: CanonicalView, found: Sequence[Site | Refused], inside: dict[fx.Node, _Inside]
) -> list[Site | Refused]:
    """Refuse sites whose scores or dropout mask are needed for something else as well."""
    sites = [item for item in found if isinstance(item, Site)]
    reasons: dict[fx.Node, str] = {}
    while True:
        kept = [site for site in sites if site.output not in reasons]
        live = view.live_without({site.output: _operands(site) for site in kept})
        needed = {
            site.output: reason
            for site in kept
            if (reason := _reason_shared(inside.get(site.output), live)) is not None
        }
        if not needed:
            break
        reasons |= needed
    return [
        Refused(item.name, item.spelling, reasons[item.output], item.anchor)
        if isinstance(item, Site) and item.output in reasons
        else item
        for item in found
    ]


def _operands(site: Site) -> tuple[fx.Node, ...]:
    sides = [side.distance.node if side.distance else side.node for side in site.sides]
    return (*(operand.access.node for operand in (site.q, site.k, site.v)), *sides)


def _reason_shared(inside: _Inside | None, live: frozenset[fx.Node]) -> str | None:
    if inside is None:
        return None
    if any(node in live for node in inside.noise):
        return "the dropout mask is used outside the attention (returned, or applied again)"
    if inside.scores in live:
        return "the scores are used outside the attention (returned, or by what is not understood)"
    return None


def module_path(node: fx.Node) -> str:
    """The path of the module that a Dynamo node was called in, without the root's own name."""
    stack = origin_of(node).meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    root, _, rest = path.partition("].")
    return rest if root.startswith("L[") else "" if path.startswith("L[") else path


def _numbered(found: list[Site | Refused]) -> list[Site | Refused]:
    counts: dict[str, int] = {}
    out: list[Site | Refused] = []
    for item in found:
        if isinstance(item, Site):
            ordinal = counts.get(item.name, 0)
            counts[item.name] = ordinal + 1
            item = replace(item, ordinal=ordinal)
        out.append(item)
    return out


def _attempted(view: CanonicalView, node: fx.Node) -> Site | Refused:
    try:
        return _sdpa_site(view, node)
    except (Refusal, NotAffine) as refusal:
        return Refused(module_path(node), "sdpa", str(refusal), node)


# -- products --------------------------------------------------------------------------------------


def _product_site(
    view: CanonicalView, node: fx.Node, inside: dict[fx.Node, _Inside]
) -> Site | Refused | None:
    """The site whose product with V this node is; None where it is no such product.

    Notes in `inside` what lies between the site's two products.
    """
    shape = meta_of(node).shape
    batch = [Axis(f"i{d}", size) for d, size in enumerate(shape[:-2])]
    row, column = Axis("r", shape[-2]), Axis("c", shape[-1])
    index = tuple(Index.of_axis(axis) for axis in (*batch, row, column))
    product = contraction_at(Access(node, index), "n")
    if product is None or product.addend is not None:
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
        loops = _Loops(batch[0] if batch else Axis("i0", ONE), query, product.over, value)
        try:
            site, inside[node] = _manual_site(view, node, index, below, values, loops)
            return site
        except (Refusal, NotAffine) as refusal:
            path = module_path(softmax.node)
            return Refused(path, softmax.spelling, str(refusal), softmax.node)
    return None


@dataclass(frozen=True)
class _Loops:
    """The loop axes of the product with V."""

    batch: Axis
    query: Axis
    key: Axis
    value: Axis


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
    loops: _Loops,
) -> tuple[Site, _Inside]:
    softmax = below.softmax
    if softmax.scores.index[softmax.dim] != Index.of_axis(loops.key):
        raise Refusal("a softmax over more than the keys, not from their first", softmax.node)
    refusal: Exception | None = None
    for read_at, scores in products_below(softmax.scores, "d"):
        try:
            site = _site_of(view, node, index, below, values, loops, read_at, scores)
            return site, _Inside(read_at.node, below.noise)
        except (Refusal, NotAffine) as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    between = obstacle(softmax.scores.node)
    if between is None or is_contraction(between):
        raise Refusal("scores in a layout that is not understood", softmax.node)
    raise Refusal(f"{between.target} between the product and softmax is not understood", between)


def _site_of(
    view: CanonicalView,
    node: fx.Node,
    index: tuple[Index, ...],
    below: Probabilities,
    values: Access,
    loops: _Loops,
    read_at: Access,
    product: Contraction,
) -> Site:
    q_at, k_at = _query_and_key(product, loops)
    chains = [operand_chain(view, access) for access in (q_at, k_at, values)]
    chains[2] = tuple(link for link in chains[2] if link.factor == 1)
    softmax = below.softmax
    visited = scores_accesses(softmax.scores, product_node=read_at.node)
    axes = _axes(loops, chains, visited, read_at.node)
    targets = _targets(axes, product.over, loops.value)
    (query, q_factor), (key, k_factor), (value, _) = (
        chosen_operand(chain, axes, target) for chain, target in zip(chains, targets, strict=True)
    )
    reader = SideReader(view, axes, read_at.node, product)
    scores = Access(softmax.scores.node, tuple(axes.renamed(p) for p in softmax.scores.index))
    element = as_number(reader.read(scores))
    dtype = _narrowest(meta_of(scores.node).dtype, meta_of(read_at.node).dtype)
    parts = score_parts(element, dtype, softmax.zero_rows, _key_in_every_row(axes))
    parts = _zeroed(parts, below, reader, axes)
    sink = _sink(reader, scores, softmax.dim, loops.key, parts.row_terms)
    return _assembled(
        view,
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
    )


def _narrowest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype with the least range."""
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).max)


def _key_in_every_row(axes: AttentionAxes) -> Callable[[Any], bool]:
    facts = _facts(axes)
    sizes = {axes.query.size: M, axes.key.size: N}
    named = {size: name for size, name in sizes.items() if isinstance(size, sympy.Symbol)}
    return lambda mask: has_key_in_every_row(normalized(mask.xreplace(named)), facts)


def _query_and_key(product: Contraction, loops: _Loops) -> tuple[Access, Access]:
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


def _digits(accesses: Iterable[Access]) -> list[Digit]:
    return [digit for a in accesses for position in a.index for digit, _ in position.terms]


def _axes(
    loops: _Loops,
    chains: Sequence[Sequence[Link]],
    visited: Sequence[Access],
    product_node: fx.Node,
) -> AttentionAxes:
    """The canonical axes, cut as finely as any operand or mask needs; coarser where that fails."""
    spine = Spine(product_node)
    linked = [[link.access for link in chain] for chain in chains]
    sides = [a for a in visited if not spine.holds(a.node)]
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
                loops.batch, loops.query, loops.key, _digits(accesses), kv, _digits(sides)
            )
        except NotAffine:
            continue
    raise Refusal("axes that are cut in ways that do not fit together")


def _targets(
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


def _assembled(
    view: CanonicalView,
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
    if requires_grad and parts.filled and parts.empty_row is EmptyRow.UNIFORM:
        raise Refusal("rows without a key filled with a number, whose gradient stops there", output)
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
        ordinal=0,
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


# -- SDPA ------------------------------------------------------------------------------------------


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
    loops = _Loops(batch, query, key, value)
    lead_index = _unfolded(batch, lead)
    q_at = Access(named["query"], (*lead_index, Index.of_axis(query), Index.of_axis(inner)))
    k_lead = _shared_heads(lead_index, lead, shapes[1][:-2], bool(named["enable_gqa"]), node)
    v_lead = _shared_heads(lead_index, lead, shapes[2][:-2], bool(named["enable_gqa"]), node)
    k_at = Access(named["key"], (*k_lead, Index.of_axis(key), Index.of_axis(inner)))
    v_at = Access(named["value"], (*v_lead, Index.of_axis(key), Index.of_axis(value)))
    chains = [operand_chain(view, access) for access in (q_at, k_at, v_at)]
    index = (*lead_index, Index.of_axis(query), Index.of_axis(value))
    scores_index = (*lead_index, Index.of_axis(query), Index.of_axis(key))
    axes = _axes(loops, chains, [Access(node, scores_index)], node)
    q_target, k_target, v_target = _targets(axes, inner, value)
    operands = (
        chosen_operand([li for li in chains[0] if li.factor == 1], axes, q_target)[0],
        chosen_operand([li for li in chains[1] if li.factor == 1], axes, k_target)[0],
        chosen_operand([li for li in chains[2] if li.factor == 1], axes, v_target)[0],
    )
    reader = SideReader(view, axes, node, None)
    parts = _sdpa_parts(named, reader, axes, scores_index, inner, node)
    return _assembled(
        view,
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
    parts = score_parts(element, dtype, True, _key_in_every_row(axes))
    empty_row = EmptyRow.ZERO if keep != sympy.true else parts.empty_row
    return replace(
        parts, scale=parts.scale * number, mask=sympy.And(parts.mask, keep), empty_row=empty_row
    )


# -- what was not matched --------------------------------------------------------------------------


_EXPONENTIALS = (aten.exp.default, aten.exp2.default, aten.pow.Scalar)


def _unmatched(view: CanonicalView, anchors: set[fx.Node]) -> Iterator[Refused]:
    """Softmaxes (and exponentials) between two products that no site was made of."""
    seen = _used_by(anchors)
    for node in view.graph.nodes:
        known = node.target in SOFTMAXES or node.target is aten._log_softmax.default
        if not known and node.target not in _EXPONENTIALS:
            continue
        if node in seen or node not in view.live or obstacle(node) is None:
            continue
        way = _way_to_product(node)
        if way is None or not (known or any(_is_quotient(step) for step in way)):
            continue
        reason, spelling = _why_unmatched(way, known), "softmax" if known else "exp/sum"
        yield Refused(module_path(node), spelling, reason, node)


def _used_by(anchors: Iterable[fx.Node], depth: int = 8) -> set[fx.Node]:
    """The anchors and what lies closely above them."""
    seen, layer = set(anchors), set(anchors)
    for _ in range(depth):
        layer = {
            above
            for node in layer
            for above in node.all_input_nodes
            if above not in seen and not is_contraction(above)
        }
        seen |= layer
    return seen


def _why_unmatched(way: Sequence[fx.Node], known: bool) -> str:
    """The reason, from the ops between a softmax and the product with V, in order."""
    unknown = [step for step in way if not is_view(step)]
    if not known:
        return "exponentials over something else than their sum over the keys"
    if not unknown:
        return "the softmax does not run over the axis that the product with V sums"
    return f"{unknown[0].target} between softmax and the product with V is not understood"


def _is_quotient(node: fx.Node) -> bool:
    return node.target in (aten.div.Tensor, aten.reciprocal.default)


def _way_to_product(node: fx.Node, most: int = 48) -> list[fx.Node] | None:
    """The ops on the shortest way from a node to a batched product below it; None without one."""
    pending: list[tuple[fx.Node, list[fx.Node]]] = [(user, []) for user in node.users]
    for _ in range(most):
        if not pending:
            return None
        below, way = pending.pop(0)
        if below.target is aten.bmm.default:
            return way
        pending.extend((user, [*way, below]) for user in below.users)
    return None
