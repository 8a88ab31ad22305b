"""The canonical view as a value: a functional ATen graph beside the Dynamo graph it retells.

canonicalize.py makes it; everything that is matched is read from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.deadline import Deadline
from adaattn_compiler.passes.dynamo_graph import source_of
from adaattn_compiler.spec import Refusal


def opaque(*inputs: Any) -> Any:
    """Stands in the view for a call that is not looked into."""
    raise NotImplementedError("opaque nodes are never run")


def overwritten(*inputs: Any) -> Any:
    """Stands in the view for a tensor that an in-place op changed through an alias."""
    raise NotImplementedError("overwritten nodes are never run")


def getitem(sequence: Any, position: int) -> Any:
    """Item of a result that is a tuple, as the view has it."""
    return sequence[position]


@dataclass(frozen=True)
class TensorMeta:
    """What the analysis needs to know of a tensor; sizes are sympy expressions."""

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class CanonicalView:
    """A functional ATen graph, and how its nodes and those of the Dynamo graph correspond.

    values: Dynamo node -> the view's node for its result, or a (nested) tuple of such.
    known: view node -> the first Dynamo node whose result it is.
    read_until: view node -> the Dynamo node that overwrites its storage (it must be read before).
    constants: view node -> its value, for tensors made from Python data in the graph.
    live: the nodes that the outputs and effects need; effects: the calls that change an input, or
    return nothing (assertions).
    buffers: nodes that are module buffers: which of the graph's inputs, and its value now.
    deadline: by when the analysis of the graph must be done.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any]
    known: dict[fx.Node, fx.Node]
    read_until: dict[fx.Node, fx.Node]
    constants: dict[fx.Node, torch.Tensor]
    live: frozenset[fx.Node]
    effects: frozenset[fx.Node]
    buffers: dict[fx.Node, tuple[int, torch.Tensor]]
    deadline: Deadline

    def live_without(self, bridges: dict[fx.Node, tuple[fx.Node, ...]]) -> frozenset[fx.Node]:
        """The nodes still needed when each bridged node is computed from the given ones instead."""
        return live_nodes(self.graph, self.effects, bridges)


def meta_of(node: fx.Node) -> TensorMeta:
    """The tensor that a view node stands for; Refusal where it is not one tensor."""
    meta = node.meta.get("tensor")
    if not isinstance(meta, TensorMeta):
        raise Refusal("a value that is not a tensor", node)
    return meta


def origin_of(node: fx.Node) -> fx.Node:
    """The Dynamo node that a view node came from."""
    origin: fx.Node = node.meta["origin"]
    return origin


def owner_of(placeholder: fx.Node) -> str | None:
    """Where a module holds a Dynamo graph's input: "_parameters", "_buffers"; None elsewhere."""
    base = getattr(source_of(placeholder), "base", None)
    member: str | None = getattr(base, "member", None)
    return member


def call_name(node: fx.Node) -> str:
    """What a view node's call is called in messages."""
    target = origin_of(node).target if node.target is opaque else node.target
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return str(getattr(target, "__name__", target))


def size_expr(size: Any) -> sympy.Expr:
    """A Python or symbolic integer as a sympy expression."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.sympify(size)


def live_nodes(
    graph: fx.Graph, effects: frozenset[fx.Node], bridges: dict[fx.Node, tuple[fx.Node, ...]]
) -> frozenset[fx.Node]:
    """The nodes that the outputs and effects depend on, a bridged node on others than its own."""
    pending = [*graph.find_nodes(op="output"), *effects]
    live: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(bridges.get(node, node.all_input_nodes))
    return frozenset(live)
