"""Writing tensors of the canonical view into a copy of the Dynamo graph.

A tensor of the view that is some Dynamo node's result is that node; any other is written anew from
the ATen calls that made it. An operand's layout is brought about by views alone wherever its
dimensions allow it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from adaattn_compiler.kernels.evaluate import evaluate
from adaattn_compiler.kernels.problem import Sizes
from adaattn_compiler.passes.axes import atoms_of, within
from adaattn_compiler.passes.canonical_view import (
    CanonicalView,
    getitem,
    meta_of,
    opaque,
    origin_of,
    overwritten,
)
from adaattn_compiler.passes.dynamo_graph import note_own_input
from adaattn_compiler.passes.index_map import ONE, Axis, Digit, Index
from adaattn_compiler.passes.operands import is_direct, mixed_radix
from adaattn_compiler.passes.site import Operand
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten

# Note [Numbers in the graph]
#
# Dynamo gives a graph each float as a tensor of float64 on the CPU, and its `item()`. AOTAutograd
# puts the tensor back where the item meets a tensor in arithmetic; where it is anything else (in
# `torch.full`, or an argument of an op) the float becomes a constant with a guard, so that each
# other float is a compilation. So the tensor on the device is a product.

# Calls whose result differs from one run to the next: never written a second time.
_RANDOM = (aten.bernoulli.p, aten.native_dropout.default, aten.rand_like.default)


class Emitter:
    """Writes before one node of the copied graph.

    copies: Dynamo node -> its copy. before: the Dynamo node that what is written must precede.
    """

    def __init__(
        self,
        view: CanonicalView,
        tracer: fx.proxy.GraphAppendingTracer,
        copies: dict[fx.Node, fx.Node],
        before: fx.Node,
    ) -> None:
        self.view = view
        self.graph = tracer.graph
        self.copies = copies
        self.before = before
        self.written: dict[fx.Node, fx.Node] = {}
        self.new: list[fx.Node] = []
        self.inputs: list[fx.Node] = []
        self._order = {node: i for i, node in enumerate(before.graph.nodes)}
        self._tracer = tracer
        self.fake_mode = next(
            value.fake_mode
            for node in before.graph.nodes
            if hasattr(value := node.meta.get("example_value"), "fake_mode")
        )

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Write what a Python function does to its arguments: nodes, plain or symbolic numbers."""
        args, kwargs = self._sized(args), self._sized(kwargs)
        first = self._last()
        with self.graph.inserting_before(self.copies[self.before]):
            result = function(*self._proxies(args), **self._proxies(kwargs))
        self._note_new(first)
        return _unwrapped(result)

    def node(self, target: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        """Write one call, also one that no proxy would hold up (`torch.arange(8)`)."""
        node: fx.Node = self.call(
            lambda given, named: self._tracer.create_proxy("call_function", target, given, named),
            args,
            kwargs,
        )
        return node

    def method(self, name: str, tensor: fx.Node, *args: Any) -> fx.Node:
        """Write a call of a tensor's method."""
        node: fx.Node = self.call(lambda x, *rest: getattr(x, name)(*rest), tensor, *args)
        return node

    def input(self, name: str, value: torch.Tensor) -> fx.Node:
        """One more input, after those that the graph has; value: what it is like. Whoever calls the
        graph passes the same tensor in each call."""
        last = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["example_value"] = self.fake_mode.from_tensor(value, static_shapes=True)
        note_own_input(node)
        self.inputs.append(node)
        return node

    def _proxies(self, tree: Any) -> Any:
        """Call arguments with proxies for nodes."""
        if isinstance(tree, fx.Node):
            return fx.Proxy(tree, self._tracer)
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._proxies(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._proxies(item) for key, item in tree.items()}
        if isinstance(tree, Sizes):
            fields = {
                f.name: self._proxies(getattr(tree, f.name)) for f in dataclasses.fields(tree)
            }
            return Sizes(**{**fields, "memo": tree.memo})
        return tree

    def _last(self) -> fx.Node:
        return self.copies[self.before].prev

    def _note_new(self, after: fx.Node) -> None:
        first = len(self.new)
        node = after.next
        while node is not self.copies[self.before]:
            self.new.append(node)
            node = node.next
        for written in self.new[first:]:  # all are known before one of them fails
            written.meta["example_value"] = self._fake_value(written)

    def _fake_value(self, node: fx.Node) -> Any:
        """What the node yields, on fake tensors, as Dynamo notes it of its own nodes."""
        fake_mode = self.fake_mode
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._fake_argument)
        shape_env = fake_mode.shape_env
        quiet = contextlib.nullcontext() if shape_env is None else shape_env.suppress_guards()
        with fake_mode, quiet, enable_python_dispatcher():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _fake_argument(self, node: fx.Node) -> Any:
        """A node's value as Dynamo noted it, which for a few calls is a real tensor."""
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and not hasattr(value, "fake_mode"):
            return self.fake_mode.from_tensor(value)
        return value

    # -- tensors of the view ---------------------------------------------------------------

    def tensor(self, node: fx.Node) -> fx.Node:
        """The node of the copied graph that holds a view node's tensor; Refusal where none can."""
        if node in self.written:
            return self.written[node]
        self._check_not_overwritten(node)
        dynamo = self.view.known.get(node)
        if dynamo is not None and self._order[dynamo] < self._order[self.before]:
            return self.copies[dynamo]
        if node.op != "call_function" or node.target in (opaque, overwritten, *_RANDOM):
            raise Refusal("a tensor that cannot be computed a second time", node)
        args = fx.node.map_arg(node.args, self.tensor)
        kwargs = fx.node.map_arg(node.kwargs, self.tensor)
        target: Any = operator.getitem if node.target is getitem else node.target
        result = self.node(target, args, kwargs)
        self.written[node] = result
        return result

    def tensor_of_origin(self, value: fx.Node) -> fx.Node:
        """A tensor written anew from what is written already, even a Dynamo node's result."""
        if value in self.written:
            return self.written[value]
        if origin_of(value) is not self.before:
            return self.tensor(value)
        args = fx.node.map_arg(value.args, self.tensor_of_origin)
        kwargs = fx.node.map_arg(value.kwargs, self.tensor_of_origin)
        target: Any = operator.getitem if value.target is getitem else value.target
        result = self.node(target, args, kwargs)
        self.written[value] = result
        return result

    def like(self) -> fx.Node:
        """Some tensor of the graph, for its device."""
        for dynamo, copy in self.copies.items():
            if isinstance(dynamo.meta.get("example_value"), torch.Tensor):
                return copy
        raise Refusal("a graph without tensors")

    def _check_not_overwritten(self, node: fx.Node) -> None:
        by = self.view.read_until.get(node)
        if by is not None and self._order[by] < self._order[self.before]:
            raise Refusal("an operand that is overwritten before the attention's result", node)

    def _sized(self, tree: Any) -> Any:
        """Call arguments with symbolic sizes as nodes."""
        if isinstance(tree, sympy.Basic):
            return self.size(tree)
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._sized(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._sized(item) for key, item in tree.items()}
        return tree

    def size(self, expression: Any) -> Any:
        """A size as an int or as a node that computes it."""
        expression = sympy.sympify(expression)
        if expression.is_Integer:
            return int(expression)
        if expression.is_Float:
            return float(expression)
        if expression.is_Symbol:
            return self._symbol(expression)
        terms = [self.size(argument) for argument in expression.args]
        combine = _ARITHMETIC.get(type(expression).__name__)
        if combine is None:
            raise Refusal(f"a size that is {expression}")
        return self.call(combine, *terms)

    def _symbol(self, symbol: sympy.Symbol) -> Any:
        """A node for a shape symbol: a placeholder, or a size of some tensor."""
        for dynamo, copy in self.copies.items():
            if self._order[dynamo] >= self._order[self.before]:
                break
            value = dynamo.meta.get("example_value")
            if isinstance(value, (torch.SymInt, torch.SymFloat)) and value.node.expr == symbol:
                return copy
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                        return self.call(torch.ops.aten.sym_size.int, copy, dim)
        raise Refusal(f"a size {symbol} that no tensor has")

    # -- numbers ---------------------------------------------------------------------------

    def number(
        self,
        expression: sympy.Expr,
        device: torch.device,
        dtype: torch.dtype,
        memo: dict[Any, fx.Node],
    ) -> fx.Node:
        """A number over symbols of floats as a tensor without axes, computed in float64.

        memo: what was written for other sites of the graph.
        """
        key = ("number", expression, device, dtype)
        if key not in memo:
            symbols = sorted(expression.free_symbols, key=str)
            values = [self._float64(symbol, device, memo) for symbol in symbols]
            wide = self.call(
                lambda *given: evaluate(
                    expression, dict(zip(symbols, given, strict=True)), _no_load
                ),
                *values,
            )
            memo[key] = wide if dtype == torch.float64 else self.method("to", wide, dtype)
        return memo[key]

    def _float64(
        self, symbol: sympy.Symbol, device: torch.device, memo: dict[Any, fx.Node]
    ) -> fx.Node:
        """See Note [Numbers in the graph]."""
        key = ("number", symbol, device)
        if key not in memo:
            like = {"dtype": torch.float64, "device": device}
            one = self.node(torch.ones, ((),), like)
            memo[key] = self.call(operator.mul, one, self._symbol(symbol))
        return memo[key]

    # -- layouts ---------------------------------------------------------------------------

    def operand(self, operand: Operand) -> fx.Node:
        """An operand in the layout that it is wanted in."""
        base = self.tensor(operand.access.node)
        return self.arranged(
            base, operand.access.index, meta_of(operand.access.node).shape, operand.target
        )

    def arranged(
        self,
        base: fx.Node,
        index: Sequence[Index],
        sizes: Sequence[sympy.Expr],
        target: Sequence[Index],
    ) -> fx.Node:
        """The tensor whose element at `target` is base's element at `index`."""
        if is_direct(index, sizes, target):
            return self._permuted(base, list(index), target)
        parts = [mixed_radix(p, s) for p, s in zip(index, sizes, strict=True)]
        wanted = [_digits(position) for position in target]
        every = [d for dim in [*parts, *wanted] for d in dim]
        fine = {axis: atoms_of(axis, every) for axis in {d.axis for d in every}}
        parts = [_refined(dim, fine) for dim in parts]
        wanted = [_refined(dim, fine) for dim in wanted]
        flat = [digit for dim in parts for digit in dim]
        split = [self.size(digit.extent) for digit in flat]
        atoms = self.method("reshape", base, split) if flat else base
        order = [digit for dim in wanted for digit in dim]
        spread = self._permuted(
            atoms, [Index(((d, ONE),)) for d in flat], [Index(((d, ONE),)) for d in order]
        )
        shape = [self.size(_extent(dim)) for dim in wanted]
        return self.method("reshape", spread, shape)

    def _permuted(self, base: fx.Node, index: list[Index], target: Sequence[Index]) -> fx.Node:
        """By transposing, dropping and adding dimensions of size 1, and expanding."""
        nothing = Index()
        free = [d for d, position in enumerate(index) if position == nothing]
        missing = [
            t for t, position in enumerate(target) if position not in index or position == nothing
        ]
        while len(free) > len(missing):
            dim = free.pop()
            base = self.method("squeeze", base, dim)
            del index[dim]
        while len(missing) > len(free):
            base = self.method("unsqueeze", base, 0)
            index.insert(0, nothing)
            free = [0, *(d + 1 for d in free)]
        spare = iter(free)
        order = [next(spare) if t in missing else index.index(p) for t, p in enumerate(target)]
        if order != list(range(len(order))):
            base = self.method("permute", base, order)
        shape = [self.size(_size_of(target[t])) if t in missing else -1 for t in range(len(target))]
        if any(size not in (-1, 1) for size in shape):
            base = self.method("expand", base, shape)
        return base


def _unwrapped(result: Any) -> Any:
    if isinstance(result, fx.Proxy):
        return result.node
    if isinstance(result, (tuple, list)):
        return type(result)(_unwrapped(item) for item in result)
    return result


def _digits(index: Index) -> list[Digit]:
    """The digits that make up a target dimension, outermost first."""
    return mixed_radix(index, _size_of(index))


def _refined(digits: Sequence[Digit], fine: dict[Axis, list[Digit]]) -> list[Digit]:
    """Digits cut into atoms."""
    return [
        atom
        for digit in digits
        for atom in fine[digit.axis]
        if within(atom, digit.div, sympy.expand(digit.div * digit.extent))
    ]


def _extent(digits: Sequence[Digit]) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*(digit.extent for digit in digits)))


def _size_of(index: Index) -> sympy.Expr:
    return _extent([digit for digit, _ in index.terms])


def _floor_div(x: Any, y: Any) -> Any:
    return x // y


def _sum(*terms: Any) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _product(*terms: Any) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = total * term
    return total


def _no_load(operand: int, index: tuple[sympy.Expr, ...]) -> Any:
    raise AssertionError("a number that reads a tensor")


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": _sum,
    "Mul": _product,
    "FloorDiv": _floor_div,
    "CleanDiv": _floor_div,
}
