"""The generated kernels on the device, backward, against autograd in float64 there."""

from __future__ import annotations

import pytest
import torch
from check import assert_as_accurate
from on_gpu import on_device, poisoned
from specs import SPECS, problem_of, random_inputs

from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.triton.launch import Tiles, forward
from adaattn_compiler.kernels.triton.launch_backward import backward, gradient_refusal
from adaattn_compiler.kernels.triton.source import Configuration

pytestmark = pytest.mark.gpu

Tensors = list[torch.Tensor]
# What has a backward, and no row without a key (whose gradient is another matter).
NAMES = ("plain", "causal", "window", "gqa", "alibi", "softcap", "sink", "dense bias", "per head")


def ours(problem: Problem, qkv: Tensors, operands: Tensors, grad: torch.Tensor) -> Tensors:
    """The gradients of q, k and v, and of the operands that are numbers."""
    dtypes = tuple(str(operand.dtype).removeprefix("torch.") for operand in operands)
    made_for = Configuration(problem.spec, dtypes)
    statistics = torch.full((*qkv[0].shape[:3], 2), float("nan"), device="cuda")
    wanted = [operand.is_floating_point() for operand in operands]
    given = (operands, problem.param_hints)
    tiles = Tiles(32, 32, 4, 2)
    with poisoned():
        out = forward(made_for, *qkv, *given, tiles=tiles, statistics=statistics)
        return backward(made_for, grad, *qkv, out, statistics, *given, wanted)


def by_autograd(
    problem: Problem, qkv: Tensors, operands: Tensors, grad: torch.Tensor, dtype: torch.dtype
) -> Tensors:
    qkv = [tensor.detach().to(dtype).requires_grad_() for tensor in qkv]
    operands = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    numbers = [o.requires_grad_() for o in operands if o.is_floating_point()]
    out = reference_attention(*qkv, operands, problem.param_hints, problem.spec)
    return list(torch.autograd.grad(out, [*qkv, *numbers], grad.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    assert gradient_refusal(SPECS[name][0]) is None
    _assert_gradients(problem_of(name, dtype))


@pytest.mark.parametrize("name", ["causal", "gqa"])
def test_gradients_of_many_blocks_are_right(name: str) -> None:
    _assert_gradients(problem_of(name, torch.bfloat16, rows=700, columns=700))


def _assert_gradients(problem: Problem) -> None:
    qkv, operands = (on_device(part) for part in random_inputs(problem))
    grad = torch.randn_like(qkv[0])
    found = ours(problem, qkv, operands, grad)
    exact = by_autograd(problem, qkv, operands, grad, torch.float64)
    eager = by_autograd(problem, qkv, operands, grad, problem.dtype)
    for our, theirs, right in zip(found, eager, exact, strict=True):
        # Gradients of operands are float32, whatever type q has.
        assert_as_accurate(our.to(theirs.dtype), theirs, right)
