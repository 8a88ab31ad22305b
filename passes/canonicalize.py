"""The canonical view: a Dynamo graph retold in functional ATen, for analysis only.

The Dynamo graph is run once with its own fake tensors under a dispatch mode that writes down every
ATen call. What was a method, an operator, an einsum or a module is then one of few ops, casts by
autocast are visible, and an in-place op is its functional twin. Each ATen node remembers the
Dynamo node it came from (`origin`), so that a match found here can be rewritten there.

Kept whole: scaled_dot_product_attention (an anchor as it stands), the calls of higher-order ops
(`opaque`; their bodies are graphs of their own), and what no attention can be in (relevance.py).
The run adds no guards, and the Dynamo graph is not edited.

Aliasing: after an in-place op, other tensors of the same storage are `overwritten` here: who reads
one of them later reads an op that nobody understands, and what it belongs to is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode

from adaattn_compiler.passes.canonical_view import (
    CanonicalView,
    TensorMeta,
    getitem,
    live_nodes,
    opaque,
    origin_of,
    overwritten,
    owner_of,
    size_expr,
)
from adaattn_compiler.passes.deadline import NO_DEADLINE, Deadline
from adaattn_compiler.passes.relevance import SDPA, kept_whole
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten


def canonicalize(
    graph_module: fx.GraphModule, real: Sequence[Any] = (), deadline: Deadline = NO_DEADLINE
) -> CanonicalView:
    """The canonical view of a Dynamo graph, from the `example_value` of its placeholders.

    real: the graph's example inputs, of which those that are module buffers are kept with the view.
    Raises whatever the run raises; the caller then leaves the graph alone.
    """
    recorder = _Recorder(deadline, _is_differentiable(graph_module.graph))
    interpreter = _RecordingInterpreter(graph_module, recorder)
    inputs = [
        node.meta.get("example_value")
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
    ]
    if any(
        "functorch" in str(getattr(n.target, "__module__", "")) for n in graph_module.graph.nodes
    ):
        raise Refusal("a graph inside a transform of torch.func")
    fake_mode = next((t.fake_mode for t in inputs if hasattr(t, "fake_mode")), None)
    if fake_mode is None:
        raise Refusal("no input is a tensor")
    with undisturbed(fake_mode), fake_mode, recorder:
        interpreter.run(*inputs)
    return recorder.finish(_buffers(graph_module.graph, real))


def _is_differentiable(graph: fx.Graph) -> bool:
    """Whether anything in a graph is computed with gradients on."""
    return torch.is_grad_enabled() or any(
        node.target is torch._C._set_grad_enabled and node.args == (True,) for node in graph.nodes
    )


def _stops_gradient(node: fx.Node) -> bool:
    """Whether a floating-point result has no gradient though something that it is of has one."""
    result = node.meta.get("fake")
    if not isinstance(result, torch.Tensor) or not result.dtype.is_floating_point:
        return False
    above = node.all_input_nodes
    if node.target is getitem:
        above = above[0].all_input_nodes
    # A fake view that was made without grad says even so that it requires it.
    return (not result.requires_grad or not node.meta["grad"]) and any(
        fake.requires_grad for n in above if isinstance(fake := n.meta.get("fake"), torch.Tensor)
    )


def _buffers(graph: fx.Graph, real: Sequence[Any]) -> dict[str, tuple[int, torch.Tensor]]:
    """Placeholders that are buffers of a module: their positions and values."""
    found: dict[str, tuple[int, torch.Tensor]] = {}
    for position, (node, value) in enumerate(zip(graph.find_nodes(op="placeholder"), real)):  # noqa: B905
        held = owner_of(node) == "_buffers"
        if held and isinstance(value, torch.Tensor) and not _is_fake(value):
            found[node.name] = (position, value)
    return found


@contextlib.contextmanager
def undisturbed(fake_mode: Any) -> Iterator[None]:
    """Keeps grad and autocast state, and guards, as they were before a run of the graph."""
    shape_env = fake_mode.shape_env
    no_guards = contextlib.nullcontext() if shape_env is None else shape_env.suppress_guards()
    with (
        torch.set_grad_enabled(torch.is_grad_enabled()),
        enable_python_dispatcher(),
        torch.autocast(
            "cpu",
            enabled=torch.is_autocast_enabled("cpu"),
            dtype=torch.get_autocast_dtype("cpu"),
            cache_enabled=False,  # a weight cast before would be a tensor that nothing made
        ),
        no_guards,
    ):
        yield


class _Recorder(TorchDispatchMode):
    """Writes down ATen calls as nodes of a functional graph."""

    def __init__(self, deadline: Deadline, differentiable: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.deadline = deadline
        self.differentiable = differentiable
        self.graph = fx.Graph()
        self.origin: fx.Node | None = None
        self.paused = False
        self.node_of: dict[int, fx.Node] = {}
        self.kept: list[torch.Tensor] = []
        self.aliases: dict[int, list[torch.Tensor]] = {}
        self.values: dict[fx.Node, Any] = {}
        self.read_until: dict[fx.Node, fx.Node] = {}
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self.effects: set[fx.Node] = set()
        self.inputs: set[int] = set()
        self.results: list[fx.Node] = []

    # -- recording -------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.deadline.check()
        if self.paused or func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten.lift_fresh.default and not _is_fake(args[0]):
            return self._constant(args[0], func(*args))
        node_args, node_kwargs = self.nodes((args, kwargs))
        written = _written_tensors(func, args, kwargs)
        result = func(*args, **kwargs)
        if written:
            self._record_in_place(func, written, node_args, node_kwargs, result)
        else:
            node = self.record(func, node_args, node_kwargs, result)
            if not func._schema.returns:  # an assertion: it is there for what it does
                self.effects.add(node)
        return result

    def record(self, target: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> fx.Node:
        """A node for a call, and for each tensor of its result."""
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs))
        node.meta["origin"] = self.origin
        self.bind(node, result)
        return node

    def bind(self, node: fx.Node, result: Any) -> None:
        """Let the tensors of a result be known as this node (or items of it)."""
        node.meta["grad"] = torch.is_grad_enabled()
        if isinstance(result, torch.Tensor):
            node.meta["tensor"] = TensorMeta(
                tuple(size_expr(s) for s in result.shape), result.dtype, result.device
            )
            node.meta["fake"] = result
            self.node_of[id(result)] = node
            self.kept.append(result)
            self.aliases.setdefault(_storage(result), []).append(result)
        elif isinstance(result, (tuple, list)):
            for position, item in enumerate(result):
                if isinstance(item, (torch.Tensor, tuple, list)):
                    part = self.graph.create_node("call_function", getitem, (node, position))
                    part.meta["origin"] = self.origin
                    self.bind(part, item)

    def _record_in_place(
        self, func: Any, written: list[torch.Tensor], args: Any, kwargs: Any, result: Any
    ) -> None:
        functional = _functional_twin(func)
        target = functional if functional is not None and len(written) == 1 else opaque
        if target is opaque:
            kwargs = {}
        elif target is aten.bernoulli.p and len(args) < 2 and "p" not in kwargs:
            kwargs = {**kwargs, "p": 0.5}  # the in-place op has a default, its twin has none
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs))
        node.meta["origin"] = self.origin
        if target is opaque or any(_storage(tensor) in self.inputs for tensor in written):
            self.effects.add(node)
        self._overwrite(written, node)
        for tensor in written:
            self.bind(node, tensor)
        if isinstance(result, torch.Tensor) and id(result) not in self.node_of:
            self.bind(node, result)

    def _overwrite(self, written: list[torch.Tensor], node: fx.Node) -> None:
        """Note that a call changed these tensors, and all others of their storages with them."""
        for tensor in written:
            for alias in self.aliases.get(_storage(tensor), []):
                old = self.node_of[id(alias)]
                if self.origin is not None:
                    self.read_until.setdefault(old, self.origin)
                if alias is not tensor:
                    # It needs the call, so that whoever keeps the alias keeps the call.
                    stale = self.graph.create_node("call_function", overwritten, (old, node))
                    stale.meta.update(old.meta, origin=self.origin)
                    self.node_of[id(alias)] = stale

    def _constant(self, value: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        node = self.record(opaque, (), {}, result)
        node.name = f"constant_{len(self.constants)}"
        self.constants[node] = value
        return result

    # -- values to nodes -------------------------------------------------------------------

    def nodes(self, tree: Any) -> Any:
        """A tree of call arguments with tensors replaced by their nodes."""
        if isinstance(tree, torch.Tensor):
            if id(tree) not in self.node_of:
                self.bind(self._unknown_tensor(tree), tree)
            return self.node_of[id(tree)]
        if isinstance(tree, (tuple, list)):
            return (
                type(tree)(self.nodes(item) for item in tree)
                if type(tree) in (tuple, list)
                else tree
            )
        if isinstance(tree, dict):
            return {key: self.nodes(item) for key, item in tree.items()}
        if isinstance(tree, (torch.SymInt, torch.SymFloat)):
            return tree.node.expr
        return tree

    def _unknown_tensor(self, tensor: torch.Tensor) -> fx.Node:
        node = self.graph.create_node("call_function", opaque, ())
        node.meta["origin"] = self.origin
        if not _is_fake(tensor):
            self.constants[node] = tensor
        return node

    # -- result ----------------------------------------------------------------------------

    def finish(self, buffers: dict[str, tuple[int, torch.Tensor]]) -> CanonicalView:
        known: dict[fx.Node, fx.Node] = {}
        for dynamo_node, value in self.values.items():
            if isinstance(value, fx.Node):
                known.setdefault(value, dynamo_node)
        self.graph.output(tuple(self.results))
        for node in self.graph.nodes:  # known only now: autograd sees to it after each call
            node.meta["stops"] = self.differentiable and _stops_gradient(node)
        effects = frozenset(self.effects)
        return CanonicalView(
            self.graph,
            self.values,
            known,
            self.read_until,
            self.constants,
            live_nodes(self.graph, effects, {}),
            effects,
            {
                node: buffers[origin_of(node).name]
                for node in self.graph.find_nodes(op="placeholder")
                if origin_of(node).name in buffers
            },
            self.deadline,
        )


class _RecordingInterpreter(fx.Interpreter):
    """Runs the Dynamo graph, telling the recorder which node is running."""

    def __init__(self, module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.recorder = recorder
        self.whole = kept_whole(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        recorder = self.recorder
        recorder.origin = n
        if n.op in ("placeholder", "get_attr"):
            result = self._input(n)
        elif n.op == "output":
            # As the tensors are at the end, after all that was done to them in place.
            (outputs,) = self.fetch_args_kwargs_from_env(n)[0]
            recorder.results = list(_view_nodes(recorder.nodes(outputs)))
            return super().run_node(n)
        elif n.op == "call_function" and n.target in SDPA:
            result = self._whole(n, aten.scaled_dot_product_attention.default)
        elif isinstance(n.target, torch._ops.HigherOrderOperator):
            result, call = self._opaque(n)
            recorder.effects.add(call)
        elif n in self.whole:
            result, _ = self._opaque(n)
        else:
            result = super().run_node(n)
        recorder.values[n] = recorder.nodes(result) if _has_tensor(result) else result
        return result

    def _input(self, n: fx.Node) -> Any:
        value = (
            n.meta.get("example_value") if n.op == "placeholder" else self.fetch_attr(str(n.target))
        )
        if n.op == "placeholder":
            value = super().run_node(n)
        if isinstance(value, torch.Tensor) and id(value) not in self.recorder.node_of:
            node = self.recorder.graph.create_node("placeholder", n.name)
            node.meta["origin"] = n
            self.recorder.bind(node, value)
            self.recorder.inputs.add(_storage(value))
            if not _is_fake(value):
                self.recorder.constants[node] = value
        return value

    def _whole(self, n: fx.Node, target: Any) -> Any:
        """Run a composite call but record it as one node, its arguments by schema order."""
        recorder = self.recorder
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        recorder.paused = True
        try:
            result = torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
        finally:
            recorder.paused = False
        node_args, node_kwargs = recorder.nodes((args, kwargs))
        recorder.record(target, node_args, node_kwargs, result)
        return result

    def _opaque(self, n: fx.Node) -> tuple[Any, fx.Node]:
        """A call as one node that nobody looks into, its result as Dynamo noted it."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        inputs = list(_tensors((args, kwargs)))
        result = n.meta.get("example_value")
        return result, self.recorder.record(opaque, self.recorder.nodes(inputs), {}, result)


def _is_fake(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "fake_mode")


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


def _has_tensor(tree: Any) -> bool:
    return next(_tensors(tree), None) is not None


def _view_nodes(tree: Any) -> Iterator[fx.Node]:
    if isinstance(tree, fx.Node):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _view_nodes(item)


def _written_tensors(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensor arguments that a call changes, by its schema."""
    written: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written.extend(_tensors(value))
    return written


# In-place ops whose functional twin has another overload name.
_TWIN_OVERLOADS = {"float": "p"}


def _functional_twin(func: Any) -> Any:
    """`aten.add` for `aten.add_`, of the same overload; None where there is none."""
    name = func._schema.name.split("::")[-1]
    if not name.endswith("_"):
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    overload = _TWIN_OVERLOADS.get(func._overloadname, func._overloadname)
    return getattr(packet, overload, None) if packet is not None else None
