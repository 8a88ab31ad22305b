"""Every kernel against the oracle in float64, with same-precision SDPA-like eager as yardstick."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import sympy
import torch
from check import assert_as_accurate
from specs import BOOL, CAUSAL, PADDING, SPECS, oracle, problem_of, random_inputs

from adaattn_compiler.kernels.choose import choose, kernels
from adaattn_compiler.kernels.problem import Kernel, Problem, Sizes
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.options import Options
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Refusal,
    S,
    Where,
)


def call(kernel: Kernel, problem: Problem, seed: int = 0) -> torch.Tensor:
    tensors, operands = random_inputs(problem, seed)
    batch, rows, columns = problem.shape.hints
    sizes = Sizes(batch, problem.shape.heads, rows, columns, problem.param_hints)
    with torch.no_grad():
        result: torch.Tensor = kernel.build(problem)(*tensors, operands, sizes)
    return result


def by_name(name: str) -> Kernel:
    return next(kernel for kernel in kernels() if kernel.name == name)


def _cases() -> list[tuple[str, str, torch.dtype]]:
    """(kernel, spec, dtype); what `cpp` does in float16 but load and store is as in float32."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    found = itertools.product(("sdpa", "strips", "cpp"), SPECS, dtypes)
    few = ("plain", "causal padding uniform", "alibi")
    return [c for c in found if c[0] != "cpp" or c[2] != torch.float16 or c[1] in few]


@pytest.fixture(scope="module", autouse=True)
def _building() -> None:
    """Libraries are built in threads while the kernels that need none are tested."""
    cpp = by_name("cpp")
    for kernel, name, dtype in _cases():
        problem = problem_of(name, dtype)
        if kernel == "cpp" and cpp.refusal(problem) is None:
            cpp.prepare(problem)


@pytest.mark.parametrize(("kernel", "name", "dtype"), _cases())
def test_kernel_is_as_accurate_as_eager(kernel: str, name: str, dtype: torch.dtype) -> None:
    problem = problem_of(name, dtype)
    chosen = by_name(kernel)
    if chosen.refusal(problem) is not None:
        if kernel == "cpp":
            assert dtype == torch.float64
            return
        assert kernel == "sdpa"
        assert name in ("softcap", "sink", "sink of masked rows", "finite fill")
        return
    ours, eager = call(chosen, problem), oracle(problem, dtype)
    if dtype == torch.float64:  # eager is the oracle itself: another order of sums is all there is
        assert torch.allclose(ours, eager, rtol=1e-11, atol=1e-12, equal_nan=True)
        return
    assert_as_accurate(ours, eager, oracle(problem, torch.float64))


@pytest.mark.parametrize("kernel", ["strips", "cpp"])
def test_rows_filled_with_the_lowest_number_are_means(kernel: str) -> None:
    lowest = sympy.Float(torch.finfo(torch.float32).min)
    score = Where(sympy.And(CAUSAL, PADDING), S, lowest)
    spec = AttentionSpec(0.3, score, operands=(BOOL,))
    problem = dataclasses.replace(problem_of("padding"), spec=spec)
    ours, eager = call(by_name(kernel), problem), oracle(problem, torch.float32)
    assert_as_accurate(ours, eager, oracle(problem, torch.float64))
    mean = random_inputs(problem)[0][2].mean(2)
    assert torch.allclose(ours[:, :, 0], mean, atol=1e-6)


@pytest.mark.parametrize("name", ["sink", "alibi", "causal padding uniform"])
def test_flex_is_as_accurate_as_eager(name: str) -> None:
    problem = problem_of(name)
    ours, eager = call(by_name("flex"), problem), oracle(problem, torch.float32)
    assert_as_accurate(ours, eager, oracle(problem, torch.float64))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 700), (300, 300), (513, 257), (7, 90)])
@pytest.mark.parametrize("name", ["causal", "window", "last rows", "softcap"])
def test_strips_take_any_lengths(name: str, rows: int, columns: int) -> None:
    if name == "last rows" and rows > columns:
        pytest.skip("rows before the first key")
    problem = problem_of(name, rows=rows, columns=columns)
    if name in ("window",) and rows > columns:
        spec = dataclasses.replace(problem.spec, empty_row=EmptyRow.ZERO)
        problem = dataclasses.replace(problem, spec=spec)
    ours, eager = call(by_name("strips"), problem), oracle(problem, torch.float32)
    assert_as_accurate(ours, eager, oracle(problem, torch.float64))


@pytest.mark.parametrize("name", ["causal", "window", "sink"])
def test_nan_reaches_every_row_that_attends_to_it(name: str) -> None:
    problem = problem_of(name)
    tensors, operands = random_inputs(problem)
    tensors[1][0, 0, 5, 3] = float("nan")
    batch, rows, columns = problem.shape.hints
    attention = by_name("strips").build(problem)
    ours = attention(*tensors, operands, Sizes(batch, 4, rows, columns))
    eager = reference_attention(*tensors, operands, (), problem.spec)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert ours.isnan().any()


def test_the_op_keeps_to_its_contract() -> None:
    problem = problem_of("window")
    tensors, _ = random_inputs(problem)
    plan = repr({"kernel": "strips", "spec": problem.spec.serialize()})
    torch.library.opcheck(
        torch.ops.adaattn.attention.default,
        (*tensors, [], [], plan),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_gradient_is_refused_by_the_op_without_one() -> None:
    problem = problem_of("window")
    tensors, _ = random_inputs(problem)
    plan = repr({"kernel": "strips", "spec": problem.spec.serialize()})
    tensors[2].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.adaattn.attention(*tensors, [], [], plan)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.func.grad(lambda v: torch.ops.adaattn.attention(*tensors[:2], v, [], [], plan).sum())(
            tensors[2].detach()
        )
    with torch.no_grad():
        assert torch.ops.adaattn.attention(*tensors, [], [], plan).isfinite().all()


def test_text_that_is_no_plan_is_refused() -> None:
    tensors, _ = random_inputs(problem_of("plain"))
    with pytest.raises(ValueError, match="not a plan"):
        torch.ops.adaattn.attention(*tensors, [], [], "{}")


def test_a_spec_is_the_same_after_a_round_trip() -> None:
    for spec, _, _ in SPECS.values():
        assert AttentionSpec.deserialize(spec.serialize()) == spec
    with pytest.raises(ValueError, match="not a serialized"):
        AttentionSpec.deserialize("{'scale': 1}")


def test_flex_refuses_wrong_operands() -> None:
    from adaattn_compiler.kernels.flex import flex_runner, plan_of

    problem = problem_of("alibi")
    runner = flex_runner(plan_of(problem))
    tensors, operands = random_inputs(problem)
    with pytest.raises(ValueError, match=r"made for torch\.float32"):
        runner(tensors[0].double(), *tensors[1:], operands, ())
    with pytest.raises(ValueError, match="0 operands"):
        runner(*tensors, [], ())


def test_flex_is_built_anew_for_other_numbers_of_threads() -> None:
    problem = problem_of("alibi")
    threads = torch.get_num_threads()
    expected = call(by_name("flex"), problem)
    try:
        torch.set_num_threads(threads + 1)
        assert torch.allclose(call(by_name("flex"), problem), expected)
    finally:
        torch.set_num_threads(threads)


def test_no_kernel_is_a_refusal_with_each_reason() -> None:
    problem = dataclasses.replace(problem_of("softcap", torch.float64), requires_grad=True)
    with pytest.raises(Refusal, match=r"sdpa: .*strips: .*flex: .*cpp: "):
        choose(problem, Options())
