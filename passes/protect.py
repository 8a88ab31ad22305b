"""Keep Inductor's own attention fusion away from what is no attention over the keys.

Inductor (torch 2.11 and 2.13) takes `(q @ k.mT * c).softmax(-2) @ v` for attention and computes
another function: its patterns do not look at the softmax's dimension. A softmax over any dimension
but the last is therefore written as one over the last of a transposed view, which no pattern knows
and which costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from adaattn_compiler.passes.arguments import arguments, wrapped_dim
from adaattn_compiler.passes.canonical_view import CanonicalView, meta_of, origin_of
from adaattn_compiler.passes.emit import Emitter
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten


def protect(
    view: CanonicalView,
    tracer: fx.proxy.GraphAppendingTracer,
    copies: dict[fx.Node, fx.Node],
    live: frozenset[fx.Node],
) -> int:
    """Respell softmaxes of the copied graph that might be misread; returns how many."""
    return sum(
        _respelled(view, tracer, copies, node)
        for node in view.graph.nodes
        if node in live and _may_be_misread(node)
    )


def _may_be_misread(node: fx.Node) -> bool:
    if node.target is not aten._softmax.default:
        return False
    rank = meta_of(node).rank
    return rank > 2 and wrapped_dim(arguments(node)["dim"], rank) != rank - 1


def _respelled(
    view: CanonicalView,
    tracer: fx.proxy.GraphAppendingTracer,
    copies: dict[fx.Node, fx.Node],
    node: fx.Node,
) -> bool:
    dynamo = origin_of(node)
    value = view.values.get(dynamo)
    if not isinstance(value, fx.Node) or copies[dynamo].op not in ("call_function", "call_method"):
        return False
    emitter = Emitter(view, tracer, copies, dynamo)
    named = arguments(node)
    try:
        scores = emitter.tensor(named["self"])
        emitter.written[node] = emitter.call(
            _softmax_over, scores, named["dim"], meta_of(node).dtype
        )
        new = emitter.tensor_of_origin(value)
    except Refusal:
        for written in reversed(emitter.new):
            tracer.graph.erase_node(written)
        return False
    copies[dynamo].replace_all_uses_with(new)
    tracer.graph.erase_node(copies[dynamo])
    copies[dynamo] = new
    return True


def _softmax_over(scores: Any, dim: int, dtype: torch.dtype) -> Any:
    weights = F.softmax(scores.transpose(dim, -1), dim=-1, dtype=dtype)
    return weights.transpose(dim, -1)
