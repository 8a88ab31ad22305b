"""Python floats under `dynamic=True`: each becomes an operand without axes, and kernels take it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from check import (
    Outcome,
    assert_as_accurate,
    compiled_without_inductor,
    in_float64,
    run,
)
from torch.testing import FileCheck

from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.through_op import fills_rows
from adaattn_compiler.options import Options
from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.passes.pipeline import Analysis
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, S, Where, k, param, q

INF, NAN = float("inf"), float("nan")
Function = Callable[..., torch.Tensor]


def products(q, k):
    return q @ k.mT * 0.25


def weighted(scores, v):
    return scores.softmax(-1) @ v


def distance(q, k):
    return torch.arange(k.shape[-2]) - torch.arange(q.shape[-2])[:, None]


def causal(scores, fill=-INF):
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~keep, fill)


def scaled(q, k, v, number):
    return weighted(q @ k.mT * number, v)


def divided(q, k, v, number):
    return weighted(q @ k.mT / number, v)


def scaled_queries(q, k, v, number):
    return weighted(causal((q * number) @ k.mT), v)


def scaled_twice(q, k, v, number, other):
    return weighted(q @ k.mT * number * other, v)


def scaled_by_tensor_too(q, k, v, number, tensor):
    return weighted(torch.tanh(q @ k.mT * tensor * number), v)


def capped(q, k, v, number):
    return weighted(causal(torch.tanh(products(q, k) / number) * number), v)


def scaled_and_capped(q, k, v, number, cap):
    return weighted(causal(torch.tanh(q @ k.mT * number / cap) * cap), v)


def sloped(q, k, v, number):
    return weighted(causal(products(q, k) + distance(q, k) * number), v)


def sloped_and_capped(q, k, v, number, cap):
    scores = torch.tanh(products(q, k) / cap) * cap
    return weighted(causal(scores - distance(q, k).abs() * number), v)


def with_sink(q, k, v, number):
    scores = causal(products(q, k))
    sink = scores.new_zeros(1).add(number).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def scaled_with_sink(q, k, v, number, sink):
    scores = causal(q @ k.mT * number)
    column = scores.new_zeros(1).add(sink).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def filled(q, k, v, number):
    keep = torch.ones(q.shape[-2], k.shape[-2]).tril()
    return weighted(products(q, k) + (1 - keep) * number, v)


def windowed(q, k, v, number, width):
    """A number beside an integer that is known only at run time."""
    far = distance(q, k) < -width
    return weighted(causal(products(q, k) * number).masked_fill(far, -INF), v)


CASES: dict[str, tuple[Function, tuple[Any, ...]]] = {
    "scale": (scaled, (0.3,)),
    "divisor": (divided, (3.0,)),
    "scale of Q": (scaled_queries, (0.3,)),
    "two scales": (scaled_twice, (0.7, 0.9)),
    "cap": (capped, (2.5,)),
    "scale and cap": (scaled_and_capped, (0.3, 2.5)),
    "slope": (sloped, (0.2,)),
    "slope and cap": (sloped_and_capped, (0.2, 2.5)),
    "sink": (with_sink, (0.7,)),
    "scale and sink": (scaled_with_sink, (0.3, 0.7)),
    "fill": (filled, (-30.0,)),
    "integer beside": (windowed, (0.3, 9)),
}


def inputs(dtype: torch.dtype = torch.float32, rows: int = 21) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 3, rows, size, dtype=dtype) for size in (16, 16, 8))


@pytest.mark.parametrize("name", CASES)
def test_number_is_taken_and_accurate(name: str) -> None:
    assert_taken(name, "cpp")


@pytest.mark.parametrize("kernel", ["strips", "flex"])
@pytest.mark.parametrize("name", ["scale and cap", "slope", "scale and sink"])
def test_other_kernels_take_it_too(name: str, kernel: str) -> None:
    assert_taken(name, kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["scale", "scale and cap", "sink"])
def test_other_precisions_are_as_accurate(name: str, dtype: torch.dtype) -> None:
    """Numbers are of the type that torch computes in: not rounded to that of the tensors."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outcome = assert_taken(name, "strips" if dtype == torch.float64 else "cpp", dtype)
    assert set(problem_of(outcome).operand_dtypes) == {wide}


def assert_taken(name: str, kernel: str, dtype: torch.dtype = torch.float32) -> Outcome:
    function, numbers = CASES[name]
    tensors = inputs(dtype)
    outcome = run(function, *tensors, *numbers, options=Options(kernels=(kernel,)), dynamic=True)
    assert [(site.kernel, site.reason) for site in outcome.sites] == [(kernel, None)]
    FileCheck().check_not("softmax").run(outcome.graph)
    assert_as_accurate(outcome.result, outcome.eager, function(*in_float64(tensors), *numbers))
    return outcome


def problem_of(outcome: Outcome) -> Problem:
    (result,) = outcome.analyses[0].results
    assert isinstance(result, Lowered), result
    assert result.site.spec == result.problem.spec
    return result.problem


# -- what becomes of the spec and of the graph -----------------------------------------------------

NUMBER = OperandSpec("float", 0)


def spec_of(name: str, dynamic: bool = True) -> AttentionSpec:
    function, numbers = CASES[name]
    options = Options(kernels=("strips",))
    return problem_of(run(function, *inputs(), *numbers, options=options, dynamic=dynamic)).spec


def test_scale_is_multiplied_onto_the_queries() -> None:
    spec = spec_of("scale")
    assert (spec.score, spec.operands, spec.params) == (S, (NUMBER,), 0)


def test_scale_inside_a_function_stays_in_the_score() -> None:
    spec = spec_of("scale and cap")
    assert spec.score == Load(1) * sympy.tanh(Load(0) * S)
    assert spec.operands == (NUMBER, NUMBER)
    assert spec.empty_row is EmptyRow.NAN


def test_numbers_that_are_multiplied_are_one() -> None:
    spec = spec_of("two scales")
    assert spec.operands == (NUMBER,)


def test_integers_are_numbered_anew() -> None:
    spec = spec_of("integer beside")
    assert (spec.params, spec.operands) == (1, (NUMBER,))
    assert param(0) in spec.mask.free_symbols


def test_static_numbers_stay_in_the_spec() -> None:
    spec = spec_of("cap", dynamic=False)
    assert spec.score == 2.5 * sympy.tanh(S)
    assert spec.operands == ()


def test_number_is_written_once_for_two_layers() -> None:
    def layers(q, k, number):
        return sloped(sloped(q, k, q, number), k, q, number)

    q, k, _ = inputs()
    outcome = run(layers, q, k, 0.2, options=Options(kernels=("strips",)), dynamic=True)
    assert [site.reason for site in outcome.sites] == [None, None]
    FileCheck().check_count("torch.ones]", 1, exactly=True).run(outcome.graph)


def test_layers_with_numbers_of_their_own_keep_them() -> None:
    """They are alike but for their numbers, and one kernel serves both."""

    def layers(q, k, first, second):
        return sloped(sloped(q, k, q, first), k, q, second)

    q, k, _ = inputs()
    outcome = run(layers, q, k, 0.2, 0.9, dynamic=True)
    first, second = outcome.analyses[0].results
    assert isinstance(first, Lowered)
    assert isinstance(second, Lowered)
    assert first.problem == second.problem
    assert first.site.numbers != second.site.numbers
    exact = layers(*in_float64((q, k)), 0.2, 0.9)
    assert_as_accurate(outcome.result, outcome.eager, exact)


# -- numbers that are no ordinary ones -------------------------------------------------------------

ODD = (0.0, -0.5, INF, -INF, NAN, 1e-30, 3e38)


@pytest.mark.parametrize("name", ["scale", "divisor", "cap", "slope", "sink", "fill"])
def test_any_number_means_what_it_does_in_eager(name: str) -> None:
    """Compiled for an ordinary number, called with others."""
    function, numbers = CASES[name]
    tensors = inputs()
    seen: list[Analysis] = []
    options = Options(kernels=("cpp",))
    compiled = compiled_without_inductor(function, options, seen, dynamic=True)
    compiled(*tensors, *numbers)
    for number in ODD:
        with torch.compiler.set_stance("fail_on_recompile" if math.isfinite(number) else "default"):
            ours = compiled(*tensors, number)
        eager = function(*tensors, number)
        assert_as_accurate(ours, eager, function(*in_float64(tensors), number))


@pytest.mark.parametrize("scale", [0.0, INF, -INF])
@pytest.mark.parametrize("cap", [0.0, 1e-3, INF])
def test_any_scale_and_cap_mean_what_they_do_in_eager(scale: float, cap: float) -> None:
    tensors = inputs()
    seen: list[Analysis] = []
    options = Options(kernels=("cpp",))
    compiled = compiled_without_inductor(scaled_and_capped, options, seen, dynamic=True)
    compiled(*tensors, 0.3, 2.5)
    ours, eager = (f(*tensors, scale, cap) for f in (compiled, scaled_and_capped))
    assert_as_accurate(ours, eager, scaled_and_capped(*in_float64(tensors), scale, cap))


def masked_by_number(q, k, v, number):
    far = distance(q, k).abs() > number
    return weighted(products(q, k).masked_fill(far, -INF), v)


def test_mask_that_a_number_decides_is_read_from_its_tensor() -> None:
    tensors = inputs()
    outcome = run(masked_by_number, *tensors, 2.5, options=Options(kernels=("cpp",)), dynamic=True)
    problem = problem_of(outcome)
    assert problem.spec.operands == (OperandSpec("bool", 2),)
    assert problem.param_hints == ()
    exact = masked_by_number(*in_float64(tensors), 2.5)
    assert_as_accurate(outcome.result, outcome.eager, exact)


# -- near misses -----------------------------------------------------------------------------------


def power(q, k, v, number):
    return weighted(products(q, k).abs() ** number, v)


def capped_by_a_root(q, k, v, number):
    return weighted(torch.tanh(products(q, k) * math.sqrt(number)), v)


NEAR_MISSES: dict[str, tuple[Function, str]] = {
    "power": (power, "aten.pow.Tensor_Scalar between"),
    "root": (capped_by_a_root, "no torch form of"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_refused_with_its_reason(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    tensors = inputs()
    outcome = run(function, *tensors, 2.5, dynamic=True)
    assert [site.lowered for site in outcome.sites] == [False]
    assert reason in str(outcome.sites[0].reason)
    torch.testing.assert_close(outcome.result, outcome.eager)


@pytest.mark.parametrize("branch", [Load(0), -Load(0) * (k - q), S + Load(0)])
def test_number_under_a_condition_may_fill_rows(branch: sympy.Expr) -> None:
    spec = AttentionSpec(1.0, score=Where(sympy.Ge(q, k), S, branch), operands=(NUMBER,))
    assert fills_rows(spec)


def test_number_that_is_added_everywhere_fills_no_row() -> None:
    assert not fills_rows(AttentionSpec(1.0, score=S + Load(0) * (k - q), operands=(NUMBER,)))
