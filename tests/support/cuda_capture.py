"""Captures CUDA graphs of fake tensors up to Inductor's door, and compiles what they would launch.

Needs a CUDA build of torch, no GPU. Private torch, checked with 2.11: the side table of Triton
kernels; private Triton, checked with 3.6: `set_active`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget

from adaattn_compiler.kernels.triton.compile import TYPES, Compiled, built_for
from adaattn_compiler.options import Options
from adaattn_compiler.passes.pipeline import Analysis, rewrite
from adaattn_compiler.records import SiteRecord, records


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel in a graph, by argument names."""

    tuner: Any  # torch makes one of a kernel and its number of warps
    arguments: dict[str, Any]
    written: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.tuner.fn.__name__)

    def compiled(self, capability: int) -> Compiled:
        """The kernel as it would be launched, its tensors and sizes aligned."""
        signature, fixed, aligned = {}, {}, {}
        for place, parameter in enumerate(self.tuner.fn.params):
            value = self.arguments.get(parameter.name)
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                fixed[parameter.name] = value
            elif isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor):
                dtype = str(value.meta["val"].dtype).removeprefix("torch.")
                signature[parameter.name] = f"*{TYPES[dtype]}"
                aligned[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32"
                if isinstance(value, int) and value % 16 == 0:
                    aligned[(place,)] = [["tt.divisibility", 16]]
        (config,) = self.tuner.configs
        how = (config.num_warps, config.num_stages)
        return built_for(capability, self.tuner.fn, signature, fixed, aligned, how)


@dataclass(frozen=True)
class Captured:
    """What the passes made of a function, and the graphs that Inductor would get."""

    analyses: tuple[Analysis, ...]
    graphs: tuple[fx.GraphModule, ...]
    result: Any

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        return tuple(site for analysis in self.analyses for site in records(analysis))

    @property
    def rewritten(self) -> str:
        """The graph of ours, as text for FileCheck."""
        module = self.analyses[0].graph_module
        return "" if module is None else str(module.graph)

    @property
    def launches(self) -> list[Launch]:
        return [launch for graph in self.graphs for launch in launches_of(graph)]


def launches_of(graph: fx.GraphModule) -> Iterator[Launch]:
    op = torch.ops.higher_order.triton_kernel_wrapper_functional
    for node in graph.graph.find_nodes(op="call_function", target=op):
        fixed = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
        yield Launch(
            kernel_side_table.get_kernel(node.kwargs["kernel_idx"]),
            {**fixed, **node.kwargs["kwargs"]},
            tuple(node.kwargs["tensors_to_clone"]),
        )


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    """A tensor of a GPU that is not there, inside `fake_gpu`."""
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_(grad)


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors made here are fake, and Triton takes an H100 to be there."""
    triton.runtime.driver.set_active(_Driver())  # and stays: there is no other to go back to
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class _Driver:
    """As much of Triton's driver as torch asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def captured(
    function: Callable[..., Any],
    *args: Any,
    options: Options | None = None,
    dynamic: bool | None = None,
    launching: bool = True,
    **kwargs: Any,
) -> Captured:
    """Capture a function of CUDA tensors, rewrite it, and go on to where Inductor would begin.

    With gradients on, or unless launching (AOTAutograd makes `torch.tensor(0.0)` a constant, on the
    device), it ends with the rewritten graph.
    """
    torch.compiler.reset()
    analyses: list[Analysis] = []
    graphs: list[fx.GraphModule] = []

    def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph_module)
        forward: Callable[..., Any] = graph_module.forward
        return forward

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with unset_fake_temporarily():  # as when Dynamo calls a backend
            analysis = rewrite(graph_module, inputs, options or Options())
        analyses.append(analysis)
        module = analysis.graph_module or graph_module
        if torch.is_grad_enabled() or not launching:  # autograd's engine wants a device
            run: Callable[..., Any] = module.forward
            return run
        compiled: Callable[..., Any] = aot_module_simplified(
            module,
            inputs,
            fw_compiler=inductor,
            bw_compiler=inductor,
            inference_compiler=inductor,
        )
        return compiled

    result = torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return Captured(tuple(analyses), tuple(graphs), result)


def training_launches(found: Captured) -> tuple[list[Launch], list[Launch]]:
    """The launches, forward and backward, of the one site of a graph that trains."""
    op = torch.ops.adaattn.triton_attention_training
    op_backward = torch.ops.adaattn.triton_attention_backward
    module = found.analyses[0].graph_module
    assert module is not None
    (node,) = module.graph.find_nodes(op="call_function", target=op)
    q, k, v, operands, params, tables, plan = fx.map_arg(
        node.args, lambda arg: _again(arg.meta["example_value"])
    )
    out, statistics = map(_again, node.meta["example_value"])
    wanted = [operand.is_floating_point() for operand in operands]

    given = (q, k, v, operands, params, tables)
    before = (q, k, v, out, statistics, operands, params, tables, wanted, plan)
    with torch.no_grad():
        forward = _traced(op, *given, plan)
        backward = _traced(op_backward, torch.empty_like(out), *before)
    return list(launches_of(forward)), list(launches_of(backward))


def _traced(op: Any, *args: Any) -> fx.GraphModule:
    """What AOTAutograd makes of a call of an op."""
    leaves, structure = pytree.tree_flatten(args)

    def call(*leaves: Any) -> Any:
        with FunctionalTensorMode():
            given = pytree.tree_unflatten(leaves, structure)
            result = op(*pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, given))
        return pytree.tree_map_only(
            FunctionalTensor, lambda tensor: tensor.from_functional(), result
        )

    return make_fx(call)(*leaves)


def _again(tensor: torch.Tensor) -> torch.Tensor:
    """One like it, of the fake tensors that are made now."""
    like = {"dtype": tensor.dtype, "device": tensor.device}
    return torch.empty_strided(tensor.shape, tensor.stride(), **like)
