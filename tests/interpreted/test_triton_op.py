"""The ops of the generated kernels, interpreted: plans as text, gradients by autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from check import assert_as_accurate
from specs import SPECS, oracle, problem_of, random_inputs

from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.triton import op
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_backward import BackwardTiles
from adaattn_compiler.kernels.triton.plan import TritonPlan, plan_of
from adaattn_compiler.target import TARGETS

SMALL = Tiles(32, 32)
OPS = torch.ops.adaattn


def plan_for(problem: Problem, listed: bool = False) -> TritonPlan:
    dtypes = tuple(operand.dtype for operand in random_inputs(problem)[1])
    problem = dataclasses.replace(problem, device="cuda", operand_dtypes=dtypes)
    plan = plan_of(problem, SMALL, TARGETS["H100"])
    backward = BackwardTiles(SMALL, SMALL, SMALL) if problem.requires_grad else None
    return dataclasses.replace(plan, listed=listed, backward=backward)


def test_op_is_what_its_module_defines() -> None:
    assert OPS.triton_attention.default in (op.triton_attention._opoverload,)


@pytest.mark.parametrize(
    ("name", "listed"), [("causal", True), ("gqa", False), ("sink", True)], ids=str
)
def test_op_is_as_accurate_as_eager(name: str, listed: bool) -> None:
    problem = problem_of(name)
    tensors, operands = random_inputs(problem)
    plan = plan_for(problem, listed).serialize()
    tables = OPS.triton_tables(tensors[0], 90, 90, plan) if listed else []
    ours = OPS.triton_attention(*tensors, operands, [], tables, plan)
    assert ours.stride() == (90 * 4 * 16, 16, 4 * 16, 1)
    assert_as_accurate(ours, oracle(problem, torch.float32), oracle(problem, torch.float64))


def test_few_rows_are_divided_among_programs() -> None:
    problem = problem_of("last rows", rows=2, columns=600)
    problem = dataclasses.replace(problem, device="cuda")
    plan = plan_of(problem, SMALL, TARGETS["H100"])
    assert plan.splits > 1
    tensors, operands = random_inputs(problem)
    ours = OPS.triton_attention(*tensors, operands, [], [], plan.serialize())
    assert_as_accurate(ours, oracle(problem, torch.float32), oracle(problem, torch.float64))


@pytest.mark.parametrize(
    ("name", "listed"), [("causal", True), ("dense bias", False), ("sink", False)], ids=str
)
def test_gradients_are_as_accurate_as_eager(name: str, listed: bool) -> None:
    problem = dataclasses.replace(problem_of(name), requires_grad=True)
    tensors, operands = random_inputs(problem)
    grad = torch.randn(2, 4, 90, 16)
    exact, eager = (_gradients(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    leaves = [t.requires_grad_() for t in (*tensors, *operands) if t.is_floating_point()]
    plan = plan_for(problem, listed).serialize()
    tables = OPS.triton_tables(tensors[0], 90, 90, plan) if listed else []
    out, statistics = OPS.triton_attention_training(*tensors, operands, [], tables, plan)
    assert not statistics.requires_grad
    for ours, yardstick, wanted in zip(
        torch.autograd.grad(out, leaves, grad), eager, exact, strict=True
    ):
        assert_as_accurate(ours, yardstick, wanted)


def _gradients(problem: Problem, grad: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    tensors, operands = random_inputs(problem)
    given = [t.to(dtype) if t.is_floating_point() else t for t in (*tensors, *operands)]
    leaves = [t.requires_grad_() for t in given if t.is_floating_point()]
    out = reference_attention(*given[:3], given[3:], (), problem.spec)
    return list(torch.autograd.grad(out, leaves, grad.to(dtype)))


def test_gradient_of_the_gradient_is_refused() -> None:
    problem = problem_of("causal", rows=40, columns=40)
    problem = dataclasses.replace(problem, requires_grad=True)
    tensors, _ = random_inputs(problem)
    leaves = [t.requires_grad_() for t in tensors]
    plan = plan_for(problem).serialize()
    out = OPS.triton_attention_training(*leaves, [], [], [], plan)[0]
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(first[0].sum(), leaves)


def test_op_without_a_gradient_says_so() -> None:
    problem = problem_of("causal", rows=40, columns=40)
    tensors, _ = random_inputs(problem)
    q = tensors[0].requires_grad_()
    out = OPS.triton_attention(q, *tensors[1:], [], [], [], plan_for(problem).serialize())
    with pytest.raises(RuntimeError, match="triton_attention"):
        out.sum().backward()


@pytest.mark.parametrize("name", SPECS)
def test_plan_survives_as_text(name: str) -> None:
    plan = plan_for(dataclasses.replace(problem_of(name), requires_grad=True))
    text = plan.serialize()
    assert TritonPlan.deserialize(text) == plan
    assert TritonPlan.deserialize(text).serialize() == text


def test_what_a_plan_is_not_for_is_refused() -> None:
    problem = problem_of("gqa")
    (q, k, v), _ = random_inputs(problem)
    plan = plan_for(problem).serialize()

    def call(*tensors: torch.Tensor, operands: list[torch.Tensor] | None = None) -> object:
        return OPS.triton_attention(*tensors, operands or [], [], [], plan)

    with pytest.raises(ValueError, match="not a plan of a Triton kernel: 'cpp'"):
        OPS.triton_attention(q, k, v, [], [], [], "cpp")
    with pytest.raises(ValueError, match=r"are not \[B,H,M,D\]"):
        call(q[:, :3], k, v)
    with pytest.raises(ValueError, match=r"k is torch\.float64"):
        call(q, k.double(), v)
    with pytest.raises(ValueError, match="differ in B or N"):
        call(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="are wanted"):
        call(q, k, v, operands=[q])
    listed = plan_for(problem, listed=True).serialize()
    tables = OPS.triton_tables(q, 32, 32, listed)
    with pytest.raises(ValueError, match="tables of other sizes than 90 rows and 90 keys"):
        OPS.triton_attention(q, k, v, [], [], tables, listed)
    with pytest.raises(ValueError, match="made for inference"):
        OPS.triton_attention_training(q, k, v, [], [], [], plan)
    with pytest.raises(ValueError, match=r"q is torch\.float64"):
        call(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="0 tables for a plan that lists its blocks"):
        OPS.triton_attention(q, k, v, [], [], [], listed)
