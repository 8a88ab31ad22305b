"""Softmaxes between two products that no site was made of: what `explain` says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from adaattn_compiler.passes.anchors import SOFTMAXES
from adaattn_compiler.passes.assemble import module_path
from adaattn_compiler.passes.canonical_view import CanonicalView, call_name
from adaattn_compiler.passes.contraction import is_contraction, obstacle
from adaattn_compiler.passes.site import Refused
from adaattn_compiler.passes.views import is_view

aten = torch.ops.aten

_EXPONENTIALS = (aten.exp.default, aten.exp2.default, aten.pow.Scalar)


def unmatched(view: CanonicalView, anchors: set[fx.Node]) -> Iterator[Refused]:
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
    if any(step.target is aten.detach.default for step in way):
        return "a gradient that stops between softmax and the product with V"
    if not unknown:
        return "the softmax does not run over the axis that the product with V sums"
    return f"{call_name(unknown[0])} between softmax and the product with V is not understood"


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
