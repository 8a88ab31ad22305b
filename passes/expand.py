"""Composite calls, written out: where one Dynamo node holds a whole attention, its parts.

In a copy of the graph, `F.multi_head_attention_forward` and `torch._transformer_encoder_layer_fwd`
are replaced by the calls that they stand for (composites.py), so that the attention in them is seen
and can be rewritten like any other. Calls that are not understood are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from adaattn_compiler.passes.canonicalize import undisturbed
from adaattn_compiler.passes.composites import COMPOSITES
from adaattn_compiler.passes.dynamo_graph import copied, with_graph
from adaattn_compiler.spec import Refusal

log = logging.getLogger("adaattn_compiler")

# Calls that change how the calls after them run.
_STATE_CALLS: frozenset[Any] = frozenset(
    {
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    }
)


def expand(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its composite calls written out; the same object where there is nothing to do.

    The given graph is not edited, and no guards are added.
    """
    composites = [node for node in graph_module.graph.nodes if _is_composite(node)]
    if not composites:
        return graph_module
    graph, copies = copied(graph_module.graph)
    expanded = 0
    writer = _Writer(graph, fake_mode_of(graph_module.graph))
    with undisturbed(writer.fake_mode):
        for node in replayed(graph_module.graph):
            if not _is_composite(node):
                continue
            try:
                _write_out(writer, node, copies[node])
                expanded += 1
            except Refusal as refusal:
                log.info("%s is left as it is: %s", node.name, refusal)
    if not expanded:
        return graph_module
    graph.lint()
    return with_graph(graph_module, graph)


def fake_mode_of(graph: fx.Graph) -> Any:
    """The mode that the example values of a Dynamo graph were made in."""
    values = (node.meta.get("example_value") for node in graph.find_nodes(op="placeholder"))
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
    if mode is None:
        raise Refusal("no input is a tensor")
    return mode


def replayed(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph, each while grad mode and autocast are as they are where it runs."""
    entered: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.target in _STATE_CALLS:
            args = fx.node.map_arg(node.args, entered.__getitem__)
            entered[node] = node.target(*args, **node.kwargs)
        yield node


class _Writer(fx.proxy.GraphAppendingTracer):
    """Appends calls to a graph, each with its value on fake tensors and with metadata."""

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        super().__init__(graph)
        self.fake_mode = fake_mode
        self.meta: dict[str, Any] = {}
        self.written: list[fx.Node] = []

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        node = proxy.node
        self.written.append(node)
        node.meta.update(self.meta)
        node.meta["example_value"] = self._value(node)
        return proxy

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda above: above.meta["example_value"]
        )
        with self.fake_mode, enable_python_dispatcher():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)


def _is_composite(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in COMPOSITES


def _write_out(writer: _Writer, node: fx.Node, copy: fx.Node) -> None:
    """Replace one composite call in the copied graph; Refusal leaves the graph as it was."""
    named_arguments, write = COMPOSITES[node.target]
    writer.meta = {
        key: node.meta[key]
        for key in ("nn_module_stack", "source_fn_stack", "stack_trace")
        if key in node.meta
    }
    writer.written = []
    proxies: dict[fx.Node, Any] = {}

    def proxy(n: fx.Node) -> Any:
        return proxies.setdefault(n, fx.Proxy(n, writer))

    named = {name: fx.node.map_arg(item, proxy) for name, item in named_arguments(copy).items()}
    try:
        with writer.graph.inserting_before(copy):
            result = write(copy, named)
    except Exception as error:
        for written in reversed(writer.written):
            writer.graph.erase_node(written)
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"it could not be written out: {error!r}", node) from error
    result(copy)
