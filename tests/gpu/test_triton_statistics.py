"""Head statistics by the generated kernels on the device, against those of torch on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from check import assert_as_accurate, in_float64
from on_gpu import on_device, poisoned
from specs import problem_of, random_inputs

from adaattn_compiler.kernels.effective_rank import row_products
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.statistics import HeadStatistics, head_statistics

pytestmark = pytest.mark.gpu


def statistics(
    problem: Problem, tensors: list[torch.Tensor], operands: list[torch.Tensor]
) -> HeadStatistics:
    q, k, v = tensors
    return head_statistics(q, k, v, operands, problem.param_hints, problem.spec, rows=20, turn=1)


def as_rounded(found: HeadStatistics, name: str) -> torch.Tensor:
    """Scores instead of their logarithms, squares instead of variances, on the CPU."""
    if name == "score_quantiles":
        return found.score_quantiles.exp2().cpu()
    if name == "entropy_variance":
        return (found.entropy_variance + found.entropy.square()).cpu()
    of_all: torch.Tensor = getattr(found, name)
    return of_all.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["gqa", "window", "sink", "dense bias", "causal padding uniform", "prefix at run time"]
)
def test_every_statistic_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    problem = problem_of(name, dtype)
    tensors, operands = random_inputs(problem)
    with poisoned():
        ours = statistics(problem, on_device(tensors), on_device(operands))
    eager = statistics(problem, tensors, operands)
    exact = statistics(problem, in_float64(tensors), in_float64(operands))
    for field in dataclasses.fields(HeadStatistics):
        assert_as_accurate(*(as_rounded(each, field.name) for each in (ours, eager, exact)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gqa", "sink of masked rows", "causal padding uniform"])
def test_products_of_rows_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    problem = problem_of(name, dtype)
    (q, k, _), operands = random_inputs(problem)

    def products(tensors: list[torch.Tensor], operands: list[torch.Tensor]) -> torch.Tensor:
        return row_products(*tensors, problem.spec, operands, problem.param_hints, rows=90)

    with poisoned():
        ours = products(on_device([q, k]), on_device(operands)).cpu()
    exact = products(in_float64([q, k]), in_float64(operands))
    assert_as_accurate(ours, products([q, k], operands), exact)


def test_nothing_waits_for_the_device() -> None:
    problem = problem_of("gqa", torch.bfloat16)
    tensors, operands = map(on_device, random_inputs(problem))
    statistics(problem, tensors, operands)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics(problem, tensors, operands)
    finally:
        torch.cuda.set_sync_debug_mode("default")
