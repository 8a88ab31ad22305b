"""Running a slice of the canonical view on real tensors, at its own sizes or at others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.passes.arguments import arguments
from adaattn_compiler.passes.canonical_view import (
    CanonicalView,
    getitem,
    meta_of,
    opaque,
    overwritten,
)
from adaattn_compiler.passes.index_map import ONE
from adaattn_compiler.passes.resizing import Resizing
from adaattn_compiler.passes.site import Site
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten


@dataclass(frozen=True)
class Slice:
    """Nodes of a view in order, from leaves to the last."""

    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    constants: Mapping[fx.Node, torch.Tensor]

    def fingerprint(self) -> str:
        """Equal for slices that compute the same of tensors of the same shapes."""
        number = {node: i for i, node in enumerate((*self.leaves, *self.nodes))}
        lines = [f"{meta_of(leaf).shape}{meta_of(leaf).dtype}" for leaf in self.leaves]
        for node in self.nodes:
            named = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: sympy.Symbol(f"n{number[n]}")
            )
            value = self.constants.get(node)
            content = "" if value is None else f"{value.shape}{value.data_ptr()}"
            lines.append(f"{node.target}{named}{content}")
        return "\n".join(lines)

    def run(self, leaves: Mapping[fx.Node, torch.Tensor], resizing: Resizing) -> dict[fx.Node, Any]:
        """The value of each node, floats in float64, at the new sizes."""
        values: dict[fx.Node, Any] = dict(leaves)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for node in self.nodes:
                values[node] = self._value(node, values, resizing)
        return values

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], resizing: Resizing) -> Any:
        if node in self.constants:
            constant = resizing.cut(self.constants[node]).cpu()  # where all is run
            return constant.double() if constant.is_floating_point() else constant
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.target is getitem:
            return args[0][args[1]]
        if node.target in _SHAPED:
            return _SHAPED[node.target](node, args, kwargs, resizing)
        args = tuple(_doubled(arg, resizing) for arg in args)
        kwargs = {key: _doubled(value, resizing) for key, value in kwargs.items()}
        kwargs.pop("device", None)
        if node.target is aten.scaled_dot_product_attention.default:
            given = [*args, *_SDPA_DEFAULTS[len(args) :]]
            kwargs = {"attn_mask": given[3], "is_causal": given[5], **kwargs, "dropout_p": 0.0}
            return torch.nn.functional.scaled_dot_product_attention(*given[:3], **kwargs)
        if node.target is aten._softmax.default:
            return torch.softmax(args[0], args[1])
        if node.target is aten._log_softmax.default:
            return torch.log_softmax(args[0], args[1])
        if node.target is aten.native_dropout.default:
            return args[0], None
        if node.target is aten.bernoulli.p:
            return torch.full_like(args[0], args[1])  # so that dropout changes nothing
        assert callable(node.target)
        return node.target(*args, **kwargs)


def random_values(node: fx.Node, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random values for a leaf: floats normal in float64, integers and booleans 0 or 1."""
    dtype = meta_of(node).dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def slice_above(view: CanonicalView, site: Site) -> Slice:
    """What a site was matched from: all between its operands and its product with V."""
    stops = {site.q.access.node, site.k.access.node, site.v.access.node}
    stops |= {side.node for side in site.sides if side.distance is None}
    return slice_to(view, site.output, stops)


def slice_to(view: CanonicalView, output: fx.Node, stops: set[fx.Node]) -> Slice:
    """All that a node is computed from, up to the graph's inputs and the given nodes.

    Raises Refusal where a call among it is not understood.
    """
    constants = view.constants | {node: value for node, (_, value) in view.buffers.items()}
    needed: set[fx.Node] = set()
    leaves: list[fx.Node] = []
    pending = [output]
    while pending:
        node = pending.pop()
        if node in needed or node in leaves:
            continue
        if node in stops or (node.op == "placeholder" and node not in constants):
            leaves.append(node)
            continue
        if node.target in (opaque, overwritten) and node not in constants:
            raise Refusal("a slice that holds a call which is not understood", node)
        needed.add(node)
        pending.extend(node.all_input_nodes)
    leaves += [stop for stop in stops if stop not in leaves]
    order = {node: i for i, node in enumerate(view.graph.nodes)}
    nodes = tuple(sorted(needed, key=order.__getitem__))
    leaves.sort(key=order.__getitem__)
    return Slice(nodes, tuple(leaves), constants)


# Of q, k, v, attn_mask, dropout_p and is_causal, which may all be given by position.
_SDPA_DEFAULTS: tuple[Any, ...] = (None, None, None, None, 0.0, False)


# -- calls that name sizes -------------------------------------------------------------------------


def _doubled(value: Any, resizing: Resizing) -> Any:
    """A call's argument: floating-point dtypes become float64, symbolic numbers their values."""
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, sympy.Basic):
        return resizing.scalar(value)
    if isinstance(value, (list, tuple)) and any(isinstance(item, sympy.Basic) for item in value):
        return type(value)(_doubled(item, resizing) for item in value)
    return value


def _viewed(node: fx.Node, args: Any, kwargs: Any, resizing: Resizing) -> torch.Tensor:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    tensor: torch.Tensor = args[0]
    shape = resized_shape(meta_of(source).shape, tensor.shape, meta_of(node).shape, resizing)
    return tensor.reshape(shape)


def resized_shape(
    old_from: Sequence[sympy.Expr],
    new_from: Sequence[int],
    old_to: Sequence[sympy.Expr],
    resizing: Resizing,
) -> list[int]:
    """The shape that a reshape has when its input's sizes have changed.

    Dimensions are grouped where the old shapes agree on a product; a group of one dimension on
    either side follows from the other side.
    """
    out: list[int] = []
    i = j = 0
    while j < len(old_to):
        from_group, to_group = [i], [j]
        left, right = (old_from[i] if i < len(old_from) else ONE), old_to[j]
        while sympy.expand(left - right) != 0:
            if _value_of(left, resizing) < _value_of(right, resizing):
                i += 1
                if i >= len(old_from):
                    raise ValueError("shapes do not match")
                from_group.append(i)
                left = sympy.expand(left * old_from[i])
            else:
                j += 1
                if j >= len(old_to):
                    raise ValueError("shapes do not match")
                to_group.append(j)
                right = sympy.expand(right * old_to[j])
        total = 1
        for position in from_group:
            total *= new_from[position] if position < len(new_from) else 1
        out += _split(total, [old_to[d] for d in to_group], resizing)
        i, j = i + 1, j + 1
    return out


def _value_of(size: sympy.Expr, resizing: Resizing) -> int:
    return int(size.subs({s: resizing.old.get("N", 2) + 1 for s in size.free_symbols}))


def _split(total: int, old: Sequence[sympy.Expr], resizing: Resizing) -> list[int]:
    if len(old) == 1:
        return [total]
    new = [resizing.number(size) for size in old]
    product = 1
    for size in new:
        product *= size
    if product != total:
        # One of them must have changed beyond its name: find the one that makes the product fit.
        for d in range(len(new)):
            rest = product // new[d] if new[d] else 0
            if rest and total % rest == 0 and d == 0:
                new[d] = total // rest
                return new
        raise ValueError(f"cannot split {total} into {old}")
    return new


def _expanded(node: fx.Node, args: Any, kwargs: Any, resizing: Resizing) -> torch.Tensor:
    tensor: torch.Tensor = args[0]
    shape = [resizing.number(size) for size in meta_of(node).shape]
    offset = len(shape) - tensor.dim()
    for d, size in enumerate(tensor.shape):
        if size != 1:
            shape[offset + d] = size
    return tensor.expand(shape)


def _sliced(node: fx.Node, args: Any, kwargs: Any, resizing: Resizing) -> torch.Tensor:
    named = arguments(node)
    tensor: torch.Tensor = args[0]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    old = meta_of(source).shape[named["dim"]]
    end = named["end"]
    if end is None or (sympy.sympify(end).is_Integer and end >= 2**62):
        stop = None
    elif end == old:
        stop = tensor.shape[named["dim"]]
    else:
        stop = int(end) if isinstance(end, int) and end < 0 else resizing.number(end)
    start = named["start"] or 0
    first = int(start) if isinstance(start, int) and start <= 0 else resizing.number(start)
    result: torch.Tensor = aten.slice.Tensor(tensor, named["dim"], first, stop, named["step"])
    return result


def _created(node: fx.Node, args: Any, kwargs: Any, resizing: Resizing) -> torch.Tensor:
    """A tensor made from sizes alone."""
    meta = meta_of(node)
    dtype = torch.float64 if meta.dtype.is_floating_point else meta.dtype
    shape = [resizing.number(size) for size in meta.shape]
    named = arguments(node)
    name = node.target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    if "full" in name:
        fill = named["fill_value"]
        return torch.full(shape, _doubled(fill, resizing), dtype=dtype)
    if "ones" in name:
        return torch.ones(shape, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


def _ranged(node: fx.Node, args: Any, kwargs: Any, resizing: Resizing) -> torch.Tensor:
    named = arguments(node)
    dtype = torch.float64 if meta_of(node).dtype.is_floating_point else meta_of(node).dtype
    start = _doubled(named.get("start", 0), resizing)
    step = _doubled(named.get("step", 1), resizing)
    end = named["end"]
    stop = end if isinstance(end, float) else resizing.number(end)
    if isinstance(end, int) and start not in (0,):
        stop = end if end not in resizing.old.values() else resizing.number(end)
    return torch.arange(start, stop, step, dtype=dtype)


_SHAPED: dict[Any, Any] = {
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.reshape.default: _viewed,
    aten._reshape_alias.default: _viewed,
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    aten.arange.default: _ranged,
    aten.arange.start: _ranged,
    aten.arange.start_step: _ranged,
    **dict.fromkeys(
        (
            aten.full.default,
            aten.ones.default,
            aten.zeros.default,
            aten.empty.memory_format,
            aten.new_ones.default,
            aten.new_zeros.default,
            aten.new_full.default,
        ),
        _created,
    ),
}
