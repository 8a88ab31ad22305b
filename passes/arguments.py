"""Arguments of ATen nodes by schema name, defaults filled in."""

from __future__ import annotations

from typing import Any

from torch import fx

from adaattn_compiler.spec import Refusal


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node that calls an ATen overload, by their names in its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise Refusal("a call without a schema", node)
    named: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named


def wrapped_dim(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim
