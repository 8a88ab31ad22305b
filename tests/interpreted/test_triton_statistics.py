"""What the generated Triton kernel finds of each row on its way, in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from check import assert_as_accurate
from rows import RowStatistics, row_statistics
from specs import oracle, problem_of, random_inputs

from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.triton.launch import Tiles, forward, fused_entropy_estimate
from adaattn_compiler.kernels.triton.source import Configuration

SMALL = Tiles(32, 32)


def configured(problem: Problem) -> Configuration:
    names = (str(o.dtype).removeprefix("torch.") for o in random_inputs(problem)[1])
    return Configuration(problem.spec, tuple(names))


def estimated(problem: Problem, tensors: list[torch.Tensor] | None = None) -> RowStatistics:
    given, operands = random_inputs(problem)
    q, k, _ = tensors or given
    params = problem.param_hints
    found = fused_entropy_estimate(configured(problem), q, k, operands, params, tiles=SMALL)
    return RowStatistics(*found)


def assert_right(
    ours: RowStatistics, problem: Problem, tensors: list[torch.Tensor] | None = None
) -> None:
    eager = row_statistics(problem, torch.float32, tensors)
    exact = row_statistics(problem, torch.float64, tensors)
    for name in RowStatistics._fields:
        found, right = getattr(ours, name), getattr(exact, name)
        assert torch.equal(found == float("-inf"), right == float("-inf")), name
        finite = right.masked_fill(right == float("-inf"), 0)
        parts = (t.masked_fill(right == float("-inf"), 0) for t in (found, getattr(eager, name)))
        assert_as_accurate(*parts, finite)


@pytest.mark.parametrize(
    "name",
    [
        *("gqa", "alibi", "softcap", "sink", "sink of masked rows", "finite fill"),
        *("causal padding uniform", "causal padding nan", "prefix at run time"),
    ],
)
def test_rows_are_known_as_if_computed_apart(name: str) -> None:
    problem = problem_of(name, rows=20)
    assert_right(estimated(problem), problem)


@pytest.mark.parametrize("name", ["sink", "softcap"])
def test_the_same_is_found_beside_an_output(name: str) -> None:
    problem = problem_of(name, rows=20)
    tensors, operands = random_inputs(problem)
    made_for = configured(problem)
    found = RowStatistics(*(torch.empty(2, 4, 20) for _ in range(3)))
    out = forward(made_for, *tensors, operands, tiles=SMALL, **found._asdict())
    assert torch.equal(out, forward(made_for, *tensors, operands, tiles=SMALL))
    for ours, apart in zip(found, estimated(problem), strict=True):
        assert torch.equal(ours, apart)


@pytest.mark.parametrize("factor", [0.0, 30.0, 1000.0])
def test_entropy_loses_nothing_where_scores_are_alike_or_large(factor: float) -> None:
    problem = problem_of("causal", rows=33, columns=33)
    tensors, _ = random_inputs(problem)
    tensors[0] *= factor
    ours = estimated(problem, tensors)
    assert_right(ours, problem, tensors)
    assert ours.entropy.min() >= 0
    if factor == 0:
        keys = torch.arange(1, 34).float()
        assert torch.allclose(ours.entropy, keys.log().expand(2, 4, 33), atol=1e-6)


def test_half_precision_is_known_as_well() -> None:
    problem = problem_of("gqa", torch.float16, rows=33)
    ours = estimated(problem)
    assert all(part.dtype == torch.float32 for part in ours)
    assert_right(ours, problem)


def test_nan_comes_through() -> None:
    problem = problem_of("causal", rows=33, columns=33)
    tensors, _ = random_inputs(problem)
    tensors[1][0, 1, 20] = float("nan")
    exact, ours = row_statistics(problem, torch.float64, tensors), estimated(problem, tensors)
    for found, right in zip(ours, exact, strict=True):
        assert right.isnan().any()
        assert torch.equal(found.isnan(), right.isnan())


@pytest.mark.parametrize("empty", [(0, 20), (20, 0)])
def test_nothing_is_known_of_nothing(empty: tuple[int, int]) -> None:
    problem = problem_of("causal padding nan", rows=empty[0], columns=empty[1])
    problem = dataclasses.replace(problem, operand_shapes=((2, empty[1]),))
    entropy, maximum, lse = estimated(problem)
    assert entropy.shape == (2, 4, empty[0])
    assert entropy.isnan().all()
    assert (maximum == float("-inf")).all()
    assert (lse == float("-inf")).all()


# -- rescaling only when the maximum has grown by much ---------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 20.0])
@pytest.mark.parametrize("name", ["sink", "alibi", "causal padding uniform"])
def test_lazy_rescaling_is_as_accurate_as_eager(name: str, factor: float) -> None:
    problem = problem_of(name, rows=20)
    problem = dataclasses.replace(
        problem, spec=dataclasses.replace(problem.spec, scale=0.3 * factor)
    )
    tensors, operands = random_inputs(problem)
    made_for = configured(problem)
    lse = torch.empty(2, 4, 20)
    entropy = torch.empty(2, 4, 20)
    ours = forward(made_for, *tensors, operands, tiles=SMALL, lse=lse, entropy=entropy, lazy=True)
    assert_as_accurate(ours, oracle(problem, torch.float32), oracle(problem, torch.float64))
    apart = estimated(problem)
    assert_right(RowStatistics(entropy, apart.score_maximum, lse), problem)


@pytest.mark.parametrize("growth", [7.9, 8.1])
def test_lazy_rescaling_waits_for_eight_powers_of_two(growth: float) -> None:
    # One row, two blocks of keys; each but the first one's scores are larger by `growth`.
    problem = problem_of("plain", rows=1, columns=64)
    q, k, v = random_inputs(problem)[0]
    q[:], k[:] = 0, 0
    q[..., 0] = 1
    k[:, :, 32:, 0] = growth / 1.4426950408889634 / 0.3
    statistics = torch.empty(2, 4, 1, 2)
    made_for = configured(problem)
    out = forward(made_for, q, k, v, [], tiles=SMALL, statistics=statistics, lazy=True)
    reference, total = statistics.unbind(-1)
    rescaled = growth > 8
    assert torch.allclose(reference, torch.tensor(growth if rescaled else 0.0), atol=1e-5)
    assert torch.allclose(out, forward(made_for, q, k, v, [], tiles=SMALL), atol=1e-6)
    assert (total > 32 * 200).all() != rescaled
