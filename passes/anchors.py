"""From an attention's output product back to its softmax.

`probabilities_below` peels what may stand between softmax(scores) and the product with V (casts,
views, dropout, the slice that drops a sink's column, a second masking with zero) and names the
softmax it ends at, in any of the ways that one is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from adaattn_compiler.passes.arguments import arguments, wrapped_dim
from adaattn_compiler.passes.canonicalize import getitem
from adaattn_compiler.passes.index_map import NotAffine
from adaattn_compiler.passes.views import Access, broadcast_access, input_access
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten

SOFTMAXES = (aten._softmax.default, aten._safe_softmax.default)


@dataclass(frozen=True)
class Softmax:
    """A softmax, read at one element of its result.

    node: where its result is; scores: the element of its argument; dim: the dimension it
    normalizes; spelling: how it is written; zero_rows: whether a row of -inf gives zeros.
    """

    node: fx.Node
    scores: Access
    dim: int
    spelling: str
    zero_rows: bool = False


@dataclass(frozen=True)
class Probabilities:
    """A softmax and what was peeled between it and the product with V."""

    softmax: Softmax
    dropout_p: Any = 0.0
    zeroed_where: tuple[Access, ...] = field(default=())


def probabilities_below(access: Access) -> Probabilities | None:
    """The probabilities that an operand of a product holds; None where there are none to be seen.

    Raises Refusal where a softmax is below but something that is not understood lies between.
    """
    softmax = softmax_at(access)
    if softmax is not None:
        return Probabilities(softmax)
    below = input_access(access)
    if below is not None:
        return probabilities_below(below)
    return _dropout(access) or _zeroed(access)


def softmax_at(access: Access) -> Softmax | None:
    """The softmax that ends at this node, by whichever spelling."""
    node = access.node
    if node.target in SOFTMAXES:
        named = arguments(node)
        zero_rows = node.target is aten._safe_softmax.default
        dim = wrapped_dim(named["dim"], len(access.index))
        return Softmax(node, Access(named["self"], access.index), dim, "softmax", zero_rows)
    if node.target is aten.div.Tensor:
        return _exp_over_sum(access)
    if node.target is aten.exp.default:
        return _exp_of_log_softmax(access)
    return None


def _through_casts(node: fx.Node) -> fx.Node:
    while node.target in (aten._to_copy.default, aten.clone.default, aten.alias.default):
        node = arguments(node)["self"]
    return node


def _exp_over_sum(access: Access) -> Softmax | None:
    """`e / e.sum(dim, keepdim=True)` with e = exp(scores)."""
    named = arguments(access.node)
    numerator, denominator = named["self"], named["other"]
    if not isinstance(denominator, fx.Node):
        return None
    total = _through_casts(_through_expand(denominator))
    if total.target is not aten.sum.dim_IntList:
        return None
    summed = arguments(total)
    exponential = _through_casts(numerator)
    if (
        _through_casts(summed["self"]) is not exponential
        or exponential.target is not aten.exp.default
    ):
        return None
    if len(summed["dim"] or []) != 1 or not summed["keepdim"]:
        return None
    dim = wrapped_dim(summed["dim"][0], len(access.index))
    scores = Access(arguments(exponential)["self"], access.index)
    return Softmax(access.node, scores, dim, "exp/sum")


def _through_expand(node: fx.Node) -> fx.Node:
    while node.target is aten.expand.default:
        node = arguments(node)["self"]
    return node


def _exp_of_log_softmax(access: Access) -> Softmax | None:
    """`exp(log_softmax(s))` and `exp(s - logsumexp(s))`."""
    inner = _through_casts(arguments(access.node)["self"])
    if inner.target is aten._log_softmax.default:
        named = arguments(inner)
        dim = wrapped_dim(named["dim"], len(access.index))
        return Softmax(access.node, Access(named["self"], access.index), dim, "exp(log_softmax)")
    if inner.target is not aten.sub.Tensor:
        return None
    named = arguments(inner)
    if not isinstance(named["other"], fx.Node) or named["alpha"] != 1:
        return None
    total = _through_casts(_through_expand(named["other"]))
    if total.target is not aten.logsumexp.default:
        return None
    summed = arguments(total)
    if summed["self"] is not named["self"] or len(summed["dim"]) != 1 or not summed["keepdim"]:
        return None
    dim = wrapped_dim(summed["dim"][0], len(access.index))
    return Softmax(access.node, Access(named["self"], access.index), dim, "exp(s - logsumexp)")


def _dropout(access: Access) -> Probabilities | None:
    """`native_dropout`, or a product with a scaled Bernoulli mask."""
    node = access.node
    if node.target is getitem:
        parent, position = node.args
        if (
            isinstance(parent, fx.Node)
            and parent.target is aten.native_dropout.default
            and position == 0
        ):
            named = arguments(parent)
            below = probabilities_below(Access(named["input"], access.index))
            active = named["train"] is not False
            return below and replace(below, dropout_p=named["p"] if active else below.dropout_p)
        return None
    if node.target is not aten.mul.Tensor:
        return None
    named = arguments(node)
    for kept, mask in (("self", "other"), ("other", "self")):
        if isinstance(named[mask], fx.Node) and isinstance(named[kept], fx.Node):
            keep_p = _bernoulli(named[mask])
            if keep_p is not None:
                below = probabilities_below(broadcast_access(access, named[kept]))
                return below and replace(below, dropout_p=round(1.0 - keep_p, 12))
    return None


def _bernoulli(node: fx.Node) -> float | None:
    """The probability p of a mask `bernoulli(p) / p`; None for any other tensor."""
    if node.target not in (aten.div.Scalar, aten.div.Tensor):
        return None
    named = arguments(node)
    noise = named["self"]
    if noise.target is not aten.bernoulli.p:
        return None
    p = arguments(noise)["p"]
    same = isinstance(named["other"], (int, float)) and named["other"] == p
    return float(p) if same else None


def _zeroed(access: Access) -> Probabilities | None:
    """Probabilities set to zero where a mask says so, after the softmax."""
    node = access.node
    if node.target is aten.masked_fill.Scalar:
        named = arguments(node)
        if named["value"] != 0:
            return None
        below = probabilities_below(broadcast_access(access, named["self"]))
        mask = broadcast_access(access, named["mask"])
        return below and replace(below, zeroed_where=(*below.zeroed_where, mask))
    return None


def blocked_softmax(access: Access, steps: int = 12) -> Refusal | None:
    """Why a product whose operand seems to come from a softmax is not one of probabilities."""
    pending, seen = [access.node], 0
    while pending and seen < steps:
        node = pending.pop(0)
        seen += 1
        if node.target in SOFTMAXES:
            return Refusal(
                f"{access.node.target} between softmax and the product with V", access.node
            )
        if node.op == "call_function":
            pending.extend(n for n in node.all_input_nodes if "tensor" in n.meta)
    return None


def peeled(access: Access) -> Access:
    """The element as far up as views lead."""
    try:
        below = input_access(access)
    except NotAffine:
        return access
    return access if below is None else peeled(below)
