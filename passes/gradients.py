"""Refuse sites inside of which a gradient stops.

A kernel's gradient flows to all that it reads. Where the model stops it on the way (`detach`, a
region without grad), between the operands and the result, the site is left as it is. A detach above
an operand is no matter: the operand is the detached tensor then (views.py goes no further up).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from adaattn_compiler.passes.canonical_view import CanonicalView, getitem
from adaattn_compiler.passes.site import Refused, Site, checked
from adaattn_compiler.passes.slices import slice_above
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten

# The maximum of a row is subtracted on both sides of a softmax's quotient: its gradient is nothing.
_MAXIMA = (aten.amax.default, aten.max.dim)
# Calls that take of a tensor its form alone.
_FORMED = (
    *(aten.full_like.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.empty_like.default, aten.new_full.default, aten.new_zeros.default),
    *(aten.new_ones.default, aten.new_empty.default, aten.bernoulli.p, aten.rand_like.default),
)


def check_gradients(view: CanonicalView, found: Sequence[Site | Refused]) -> list[Site | Refused]:
    """See the module's docstring."""
    return checked(found, lambda site: _reason(view, site))


def _reason(view: CanonicalView, site: Site) -> str | None:
    """Why a site's gradient would not be the model's; None where it is."""
    if not site.output.meta["grad"]:
        return None  # nothing has a gradient there, the kernel's result neither
    try:
        between = slice_above(view, site).nodes
    except Refusal as refusal:
        return str(refusal)
    stop = next((node for node in between if _stops(node)), None)
    if stop is None:
        return None
    return f"a gradient that stops inside, by detach or a region without grad (at {stop})"


def _stops(node: fx.Node) -> bool:
    """Whether a differentiable call has an input with a gradient and a result without."""
    return bool(node.meta["stops"]) and node.target not in _FORMED and not _is_maximum(node)


def _is_maximum(node: fx.Node) -> bool:
    """Whether a node is a row's maximum, detached or not."""
    while node.target in (aten.detach.default, getitem) or node.target in _MAXIMA:
        if node.target in _MAXIMA:
            return True
        node = node.all_input_nodes[0]
    return False
