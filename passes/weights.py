"""Which of a graph's inputs are parameters of which module, and the fingerprint of a module's own.

Dynamo notes of each input where in the model it came from. The form of that name is of torch 2.11
and 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from adaattn_compiler.fingerprint import weights_fingerprint
from adaattn_compiler.passes.dynamo_graph import source_of

_STEP = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = ("_modules", "_parameters", "_buffers", "_orig_mod")


class GraphWeights:
    """The parameters among a graph's inputs, by their paths in the model."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        nodes = graph_module.graph.find_nodes(op="placeholder")
        self._parameters: dict[str, torch.Tensor] = {
            path: value
            for node, value in zip(nodes, inputs, strict=False)
            if isinstance(value, torch.nn.Parameter) and (path := _path_of(node)) is not None
        }
        self._places = {path: i for i, path in enumerate(map(_path_of, nodes)) if path is not None}
        self._known: dict[str, str | None] = {}

    def under(self, module: str) -> str | None:
        """The fingerprint of the parameters of a module; None where the graph takes none of it."""
        if module not in self._known:
            own = [(path, self._parameters[path]) for path, _ in self.places(module)]
            self._known[module] = weights_fingerprint(own) if own else None
        return self._known[module]

    def places(self, module: str) -> tuple[tuple[str, int], ...]:
        """The paths of the parameters of a module, and which inputs of the graph they are."""
        start = f"{module}." if module else ""
        own = (path for path in self._parameters if path.startswith(start))
        return tuple((path, self._places[path]) for path in own)


def _path_of(node: fx.Node) -> str | None:
    """ "layers.0.q.weight" of L['self']._modules['layers']._modules['0']..."""
    source = source_of(node)
    if source is None:
        return None
    name = source.name if isinstance(source.name, str) else source.name()
    steps = [next(filter(None, match)) for match in _STEP.findall(name)]
    return ".".join(step for step in steps[1:] if step not in _CONTAINERS)
