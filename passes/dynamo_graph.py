"""What Dynamo notes on a graph beside its calls, kept when the graph is copied.

AOTAutograd reads from it which inputs are parameters and buffers. CUDA graphs read those where they
lie; any other input they copy into memory of their own in each call, and a graph that writes to one
of those has no CUDA graph at all. A copy without these notes would be right, and slow.

Private: `_dynamo_source` of placeholders and `_param_name_to_source` of a module, which
`torch._functorch._aot_autograd.frontend_utils` wants both or neither of, and the `tensor_dict` of a
placeholder's metadata. As of torch 2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any

from torch import fx


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, with what Dynamo notes of its nodes, and which node became which."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, copies)
    (output,) = graph.find_nodes(op="output")
    copies[output] = copy.output(result)
    copies[output].meta = dict(output.meta)
    for node in graph.find_nodes(op="placeholder"):
        pass_source(node, copies[node])
    return copy, copies


def with_graph(graph_module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module like the given one, of another graph."""
    new = fx.GraphModule(graph_module, graph)
    new.meta = dict(graph_module.meta)
    if hasattr(graph_module, "_param_name_to_source"):
        new._param_name_to_source = graph_module._param_name_to_source
    return new


def source_of(placeholder: fx.Node) -> Any:
    """Where the value comes from (a `torch._guards.Source`), if Dynamo says so."""
    return getattr(placeholder, "_dynamo_source", None)


def pass_source(placeholder: fx.Node, to: fx.Node) -> None:
    """Note of a placeholder that its value comes from where that of another does."""
    if hasattr(placeholder, "_dynamo_source"):
        to._dynamo_source = placeholder._dynamo_source


def note_own_input(placeholder: fx.Node) -> None:
    """Note of a placeholder that it is ours: from nowhere in the user's code, and always the same
    tensor, as parameters are."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
