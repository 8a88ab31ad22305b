"""From an attention's output product back to its softmax.

`probabilities_below` peels what may stand between softmax(scores) and the product with V (casts,
views, dropout, the slice that drops a sink's column, a second masking with zero) and names the
softmax it ends at, in any of the ways that one is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from adaattn_compiler.passes.arguments import arguments, wrapped_dim
from adaattn_compiler.passes.canonical_view import getitem, meta_of
from adaattn_compiler.passes.index_map import Axis, Index, NotAffine
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
    """A softmax and what was peeled between it and the product with V.

    noise: random masks that no one else may need, as they are drawn anew.
    """

    softmax: Softmax
    dropout_p: Any = 0.0
    noise: tuple[fx.Node, ...] = ()
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
    if node.target is aten.exp.default:
        return _exp_of_log_softmax(access)
    quotient = _quotient(access)
    return None if quotient is None else _exp_over_sum(access, *quotient)


def _quotient(access: Access) -> tuple[Access, Access] | None:
    """(x, y) for `x / y` and `x * (1 / y)`."""
    node = access.node
    if node.target is aten.div.Tensor:
        named = arguments(node)
        if isinstance(named["other"], fx.Node):
            return broadcast_access(access, named["self"]), broadcast_access(access, named["other"])
    if node.target is aten.mul.Tensor:
        named = arguments(node)
        for kept, other in (("self", "other"), ("other", "self")):
            if isinstance(named[kept], fx.Node) and isinstance(named[other], fx.Node):
                inverse = peeled(broadcast_access(access, named[other]))
                if inverse.node.target is aten.reciprocal.default:
                    below = Access(arguments(inverse.node)["self"], inverse.index)
                    return broadcast_access(access, named[kept]), below
    return None


def _exp_over_sum(access: Access, numerator: Access, denominator: Access) -> Softmax | None:
    """`e / e.sum(dim)` with e = exp(scores)."""
    exponential, total = peeled(numerator), peeled(denominator)
    if exponential.node.target is not aten.exp.default:
        return None
    summed = _reduced(total, aten.sum.dim_IntList)
    dim = None if summed is None else _only_reduced_dim(exponential, summed)
    if dim is None:
        return None
    scores = Access(arguments(exponential.node)["self"], exponential.index)
    return Softmax(access.node, scores, dim, "exp/sum")


def _exp_of_log_softmax(access: Access) -> Softmax | None:
    """`exp(log_softmax(s))` and `exp(s - logsumexp(s))`."""
    inner = peeled(Access(arguments(access.node)["self"], access.index))
    if inner.node.target is aten._log_softmax.default:
        named = arguments(inner.node)
        dim: int | None = wrapped_dim(named["dim"], len(inner.index))
        assert dim is not None
        scores = Access(named["self"], inner.index)
        return Softmax(access.node, scores, dim, "exp(log_softmax)")
    if inner.node.target is not aten.sub.Tensor:
        return None
    named = arguments(inner.node)
    if not isinstance(named["other"], fx.Node) or named["alpha"] != 1:
        return None
    total = peeled(broadcast_access(inner, named["other"]))
    scores = peeled(broadcast_access(inner, named["self"]))
    summed = _reduced(total, aten.logsumexp.default)
    dim = None if summed is None else _only_reduced_dim(scores, summed)
    return None if dim is None else Softmax(access.node, scores, dim, "exp(s - logsumexp)")


_REDUCED = "reduced"


def _reduced(access: Access, target: Any) -> Access | None:
    """What a reduction along one dimension reads, over an axis of its own; None for another op."""
    if access.node.target is not target:
        return None
    named = arguments(access.node)
    shape = meta_of(named["self"]).shape
    if len(named["dim"] or []) != 1:
        return None
    dim = wrapped_dim(named["dim"][0], len(shape))
    index = list(access.index)
    if named["keepdim"]:
        del index[dim]
    index.insert(dim, Index.of_axis(Axis(_REDUCED, shape[dim])))
    return peeled(Access(named["self"], tuple(index)))


def _only_reduced_dim(element: Access, reduced: Access) -> int | None:
    """The dimension along which `reduced` runs through all of the tensor that `element` is of.

    None where it does not, or is elsewhere in any other dimension.
    """
    if element.node is not reduced.node:
        return None
    differ = [
        d
        for d, pair in enumerate(zip(element.index, reduced.index, strict=True))
        if pair[0] != pair[1]
    ]
    if len(differ) != 1:
        return None
    (dim,) = differ
    whole = Index.of_axis(Axis(_REDUCED, meta_of(element.node).shape[dim]))
    return dim if reduced.index[dim] == whole else None


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
            drops = named["train"] is not False
            masks = [user for user in parent.users if user.args[1] == 1]
            return _dropped(below, named["p"], masks) if drops else below
        return None
    if node.target is not aten.mul.Tensor:
        return None
    named = arguments(node)
    for kept, mask in (("self", "other"), ("other", "self")):
        if isinstance(named[mask], fx.Node) and isinstance(named[kept], fx.Node):
            noise = _bernoulli(named[mask])
            if noise is not None and meta_of(noise).shape == meta_of(node).shape:
                below = probabilities_below(broadcast_access(access, named[kept]))
                return _dropped(below, round(1.0 - arguments(noise)["p"], 12), [noise])
    return None


def _dropped(below: Probabilities | None, p: Any, noise: Sequence[fx.Node]) -> Probabilities | None:
    """Probabilities of which a part is dropped; Refusal where one was dropped before."""
    if below is not None and below.dropout_p != 0:
        raise Refusal("probabilities that are dropped twice", below.softmax.node)
    return below and replace(below, dropout_p=p, noise=(*below.noise, *noise))


def _bernoulli(node: fx.Node) -> fx.Node | None:
    """The noise of a mask `bernoulli(p) / p`; None for any other tensor."""
    if node.target not in (aten.div.Scalar, aten.div.Tensor):
        return None
    named = arguments(node)
    noise: fx.Node = named["self"]
    if noise.target is not aten.bernoulli.p:
        return None
    p = arguments(noise)["p"]
    same = isinstance(named["other"], (int, float)) and named["other"] == p
    return noise if same and isinstance(p, float) else None


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


def peeled(access: Access) -> Access:
    """The element as far up as views lead."""
    try:
        below = input_access(access)
    except NotAffine:
        return access
    return access if below is None else peeled(below)
