"""Bodies of higher-order ops: graphs of their own, rewritten like the graph that calls them.

Activation checkpointing, `torch.cond` and others call a GraphModule that hangs on the outer one.
Each is analysed as it stands at its call (with the grad mode and autocast of that place), and where
something was lowered, a copy of the outer module refers to the rewritten body.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaattn_compiler.passes.canonical_view import origin_of
from adaattn_compiler.passes.canonicalize import undisturbed
from adaattn_compiler.passes.dynamo_graph import copied, pass_source, with_graph
from adaattn_compiler.passes.expand import fake_mode_of, replayed
from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.passes.site import Refused

log = logging.getLogger("adaattn_compiler")

# Ops that run a body on the arguments that follow it, whatever its outputs' layouts are.
_CALLS = frozenset({"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"})
# Ops that hold what a body returns against something else: its layout has to stay.
_STRICT = frozenset({"cond", "while_loop", "invoke_subgraph", "scan"})


@dataclass(frozen=True)
class Body:
    """A body, and the node that calls it.

    name: the attribute that holds it. inputs: what is known of its placeholders' values (None for
    most). outer: which of the outer graph's placeholders are passed as which of the body's.
    """

    name: str
    call: fx.Node
    module: fx.GraphModule
    inputs: tuple[Any, ...]
    outer: Mapping[int, int]


@dataclass(frozen=True)
class RewrittenBody:
    """A body's new module (None: it stays), its results, and the outer inputs that it relies on."""

    body: Body
    graph_module: fx.GraphModule | None
    results: tuple[Lowered | Refused, ...]
    assumes: frozenset[int]


def rewrite_bodies(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    rewrite: Callable[[fx.GraphModule, Sequence[Any]], Any],
) -> list[RewrittenBody]:
    """What `rewrite` (graph, inputs -> Analysis) makes of each body."""
    calls = [node for node in graph_module.graph.nodes if _calls_bodies(node)]
    found: dict[str, RewrittenBody] = {}
    if not calls:
        return []
    with undisturbed(fake_mode_of(graph_module.graph)):
        for node in replayed(graph_module.graph):
            if node not in calls:
                continue
            for body in _bodies(graph_module, node, inputs):
                if body.name not in found:
                    found[body.name] = _rewritten(body, rewrite(body.module, body.inputs))
    return list(found.values())


def with_bodies(
    original: fx.GraphModule, rewritten: fx.GraphModule | None, bodies: Sequence[RewrittenBody]
) -> fx.GraphModule | None:
    """The rewritten module (ours to edit), or else a copy of the original, with the new bodies."""
    for body in bodies:
        if body.graph_module is not None:
            if rewritten is None:
                rewritten = with_graph(original, copied(original.graph)[0])
            setattr(rewritten, body.body.name, body.graph_module)
    return rewritten


def in_order(
    results: Sequence[Lowered | Refused], bodies: Sequence[RewrittenBody], graph: fx.Graph
) -> tuple[Lowered | Refused, ...]:
    """The results of a graph and of its bodies as they run."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    placed = [(place[origin_of(_anchor(result))], result) for result in results]
    placed += [(place[body.body.call], result) for body in bodies for result in body.results]
    return tuple(result for _, result in sorted(placed, key=lambda item: item[0]))


def _anchor(result: Lowered | Refused) -> fx.Node:
    return result.site.anchor if isinstance(result, Lowered) else result.anchor


def _calls_bodies(node: fx.Node) -> bool:
    return _op_name(node) in _CALLS | _STRICT


def _op_name(node: fx.Node) -> str | None:
    """The name of a higher-order op that a node calls."""
    target = node.target
    return str(target.name()) if isinstance(target, torch._ops.HigherOrderOperator) else None


def _bodies(graph_module: fx.GraphModule, call: fx.Node, real: Sequence[Any]) -> Iterator[Body]:
    for position, item in enumerate(call.args):
        if not isinstance(item, fx.Node) or item.op != "get_attr" or "." in str(item.target):
            continue
        module = getattr(graph_module, str(item.target), None)
        if not isinstance(module, fx.GraphModule):
            continue
        passed = call.args[position + 1 :] if _op_name(call) in _CALLS else ()
        yield _body(str(item.target), call, module, passed, real)


def _body(
    name: str,
    call: fx.Node,
    module: fx.GraphModule,
    passed: Sequence[Any],
    real: Sequence[Any],
) -> Body:
    """The body; a placeholder that is passed an input of the outer graph is known by that."""
    outside = list(call.graph.find_nodes(op="placeholder"))
    inside = list(module.graph.find_nodes(op="placeholder"))
    if len(passed) != len(inside) or len(real) != len(outside):
        return Body(name, call, module, (), {})
    place = {node: i for i, node in enumerate(outside)}
    outer = {i: place[item] for i, item in enumerate(passed) if item in place}
    graph, copies = copied(module.graph)
    for i, o in outer.items():
        pass_source(outside[o], copies[inside[i]])
    inputs = tuple(real[outer[i]] if i in outer else None for i in range(len(inside)))
    return Body(name, call, with_graph(module, graph), inputs, outer)


def _rewritten(body: Body, analysis: Any) -> RewrittenBody:
    """What of an analysis may stand in the body's op."""
    if analysis.failure is not None:
        log.info("%s in %s is left as it is: %s", body.name, body.call.name, analysis.failure)
    results, new = analysis.results, analysis.graph_module
    if (
        new is not None
        and _op_name(body.call) in _STRICT
        and _layouts(new) != _layouts(body.module)
    ):
        reason = f"the layout of what it returns from inside {_op_name(body.call)} would change"
        results = tuple(r.site.refused(reason) if isinstance(r, Lowered) else r for r in results)
        return RewrittenBody(body, None, results, frozenset())
    return RewrittenBody(body, new, results, frozenset(body.outer[i] for i in analysis.assumes))


def _layouts(module: fx.GraphModule) -> list[str]:
    """Shapes, strides and dtypes of a body's outputs."""
    values = [n.meta["example_value"] for n in module.graph.find_nodes(op="placeholder")]
    with fake_mode_of(module.graph):
        result = fx.Interpreter(module).run(*values)
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return [
        f"{tuple(t.shape)}{t.stride()}{t.dtype}" if isinstance(t, torch.Tensor) else str(t)
        for t in tensors
    ]
