"""Which calls of a Dynamo graph the canonical view need not look into.

Most of a transformer is linear layers, norms and what lies between them, and to run all of that
call by call on fake tensors is most of what an analysis costs. A call is left whole (one node, its
value as Dynamo noted it) where no attention can be inside or above it:

- a projection: a product with a parameter, a norm, a sine. What comes out of it is an operand like
  any other; what goes in is never looked at.
- plain arithmetic and views whose results reach nothing but projections and more of their kind.
- plain arithmetic on the way to Q, K or V (a rotary embedding): an operand is followed through
  views and scalings, no further.

No attention is without what is not plain (a softmax, an exponential, a product of activations), and
whatever that reads, directly or not, is looked into, but for its operands: those of an SDPA call,
and of a product each that comes from projections by plain arithmetic alone, so that it can be no
result of a softmax.

A graph that writes in place is looked into throughout: there, who shares memory with whom matters.
"""

from __future__ import annotations

import enum
import functools
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

# Calls whose weight is at this position.
_PROJECTIONS: dict[Any, int] = {
    F.linear: 1,
    torch._C._nn.linear: 1,
    torch.addmm: 2,
    F.conv1d: 1,
    F.conv2d: 1,
    torch.conv1d: 1,
    torch.conv2d: 1,
}
_WITHOUT_WEIGHT: frozenset[Any] = frozenset(
    {F.layer_norm, F.rms_norm, torch.rms_norm, torch.layer_norm, torch.cos, torch.sin, "cos", "sin"}
)
_SCALINGS: frozenset[Any] = frozenset(
    {operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"}
)
_VIEWS: frozenset[Any] = frozenset(
    {
        *(operator.getitem, torch.reshape, torch.transpose, torch.permute, "type_as"),
        *("view", "reshape", "transpose", "permute", "contiguous", "expand", "unsqueeze"),
        *("squeeze", "flatten", "unflatten", "to", "float", "double", "half", "bfloat16"),
    }
)
_ARITHMETIC: frozenset[Any] = frozenset(
    {
        *(operator.add, operator.sub, operator.neg, torch.add, torch.sub, torch.neg, torch.cat),
        *(torch.rsqrt, torch.sqrt, torch.square, torch.mean, torch.tanh, torch.sigmoid),
        *(F.silu, F.gelu, F.relu, F.tanh, F.sigmoid, torch.relu, torch._C._nn.gelu, F.dropout),
        *("add", "sub", "neg", "rsqrt", "sqrt", "square", "mean", "tanh", "sigmoid", "relu"),
    }
)
_POWERS: frozenset[Any] = frozenset({torch.pow, operator.pow, "pow"})
_PRODUCTS: frozenset[Any] = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"})
SDPA: frozenset[Any] = frozenset(
    {
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
_WRITTEN = ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "iand", "ior", "setitem")
_IN_PLACE: frozenset[Any] = frozenset(
    {*(getattr(operator, name) for name in _WRITTEN), *(f"__{name}__" for name in _WRITTEN)}
)


class _Need(enum.IntEnum):
    """How much of a node its users have to know."""

    NOTHING = 0
    OPERAND = 1  # through views and scalings
    ALL = 2


def kept_whole(graph: fx.Graph) -> frozenset[fx.Node]:
    """The calls of a Dynamo graph that may be one node of the view; see the module's docstring."""
    if any(writes(node) for node in graph.nodes):
        return frozenset()
    bare = _bare(graph)
    needs: dict[fx.Node, _Need] = {}
    whole: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        need = needs.get(node, _Need.NOTHING)
        if node.op == "output" or _is_whole(node, need):
            whole.add(node)
            continue
        for above in node.all_input_nodes:
            needs[above] = max(needs.get(above, _Need.NOTHING), _needed(node, need, above, bare))
    return frozenset(node for node in whole if node.op != "output")


def _is_whole(node: fx.Node, need: _Need) -> bool:
    if not isinstance(node.meta.get("example_value"), torch.Tensor):
        return False
    if _is_projection(node):
        return True
    if not _is_plain(node) or need is _Need.ALL:
        return False
    return need is _Need.NOTHING or not (node.target in _VIEWS or _is_scaling(node))


def _needed(node: fx.Node, need: _Need, above: fx.Node, bare: frozenset[fx.Node]) -> _Need:
    """What a node that is looked into needs of one that it reads."""
    if node.target in SDPA:
        return _Need.OPERAND if above in node.args[:3] and above not in node.args[3:] else _Need.ALL
    if node.target in _PRODUCTS:
        return _Need.OPERAND if above in bare else _Need.ALL
    return need if _is_plain(node) else _Need.ALL


def _bare(graph: fx.Graph) -> frozenset[fx.Node]:
    """What comes from projections and inputs by plain arithmetic alone."""
    bare: set[fx.Node] = set()
    for node in graph.nodes:
        if (
            node.op == "placeholder"
            or _is_projection(node)
            or (_is_plain(node) and all(above in bare for above in node.all_input_nodes))
        ):
            bare.add(node)
    return frozenset(bare)


def _is_projection(node: fx.Node) -> bool:
    if node.target in _WITHOUT_WEIGHT:
        return True
    place = _PROJECTIONS.get(node.target)
    if place is None:
        return False
    weight = node.args[place] if place < len(node.args) else node.kwargs.get("weight")
    value = weight.meta.get("example_value") if isinstance(weight, fx.Node) else None
    return isinstance(value, torch.nn.Parameter)


def _is_plain(node: fx.Node) -> bool:
    if node.target in _POWERS:  # of a tensor: a number to the power of a tensor is an exponential
        return len(node.args) == 2 and isinstance(node.args[1], (int, float))
    return any(node.target in plain for plain in (_VIEWS, _SCALINGS, _ARITHMETIC))


def _is_scaling(node: fx.Node) -> bool:
    """Whether a product or quotient is with one number."""
    return node.target in _SCALINGS and any(_is_number(argument) for argument in node.args)


def _is_number(argument: Any) -> bool:
    if not isinstance(argument, fx.Node):
        return True
    value = argument.meta.get("example_value")
    # A size that is a symbol is not compared: that would be a guard.
    return not isinstance(value, torch.Tensor) or all(
        isinstance(size, int) and size == 1 for size in value.shape
    )


def _is_told_to_write(node: fx.Node) -> bool:
    """Whether a call has `inplace` set, by name or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    place = _place_of_inplace(node.target)
    return place is not None and place < len(node.args) and node.args[place] is not False


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """The position of a function's argument `inplace`; None where it has none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a method's name, or a builtin
        return None
    return names.index("inplace") if "inplace" in names else None


def writes(node: fx.Node) -> bool:
    """Whether a call may change a tensor that it is given."""
    if node.op == "call_module":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _IN_PLACE or "out" in node.kwargs or _is_told_to_write(node):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if getattr(node.target, "__module__", None) == "_operator":  # `and_` is no `and` in place
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return name.endswith("_") and not name.endswith("__")
