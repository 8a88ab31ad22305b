"""Head statistics from the generated kernels, beside those from torch, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import sympy
import torch
from check import assert_as_accurate, in_float64
from specs import problem_of, random_inputs

from adaattn_compiler.kernels.effective_rank import (
    attention_spectrum,
    one_head_spec,
    row_products,
)
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.scored_rows import sampled_places, sampled_rows
from adaattn_compiler.kernels.statistics import HeadStatistics, head_statistics, statistics_of
from adaattn_compiler.kernels.triton.launch import Tiles, forward
from adaattn_compiler.kernels.triton.launch_rowproducts import row_products_by_tiles
from adaattn_compiler.kernels.triton.launch_statistics import (
    made_for,
    refusal_of_form,
    row_statistics,
)
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, S, k, q

TILES = Tiles(16, 32)
FIELDS = [field.name for field in dataclasses.fields(HeadStatistics)]
ROWS, TURN = 5, 1


def by_triton(
    problem: Problem, tensors: list[torch.Tensor], operands: list[torch.Tensor], splits: int = 2
) -> HeadStatistics:
    q_, k_, v_ = tensors
    given = (q_, k_, operands, problem.param_hints, problem.spec)
    assert refusal_of_form(*given) is None
    kept = row_statistics(*given, rows=ROWS, turn=TURN, tiles=TILES, splits=splits)
    return statistics_of(kept, (q_, k_, v_), problem.spec)


def by_torch(
    problem: Problem, tensors: list[torch.Tensor], operands: list[torch.Tensor]
) -> HeadStatistics:
    how = {"rows": ROWS, "turn": TURN}
    return head_statistics(*tensors, operands, problem.param_hints, problem.spec, **how)


def assert_right(
    problem: Problem, tensors: list[torch.Tensor], operands: list[torch.Tensor], splits: int = 2
) -> HeadStatistics:
    ours = by_triton(problem, tensors, operands, splits)
    eager = by_torch(problem, tensors, operands)
    exact = by_torch(problem, in_float64(tensors), in_float64(operands))
    for name in FIELDS:
        assert_as_accurate(*(as_rounded(each, name) for each in (ours, eager, exact)))
    return ours


def as_rounded(found: HeadStatistics, name: str) -> torch.Tensor:
    """What rounding is relative to: scores, not their logarithms, of which one may be near 0, and
    the mean of squared entropies, not their variance."""
    if name == "score_quantiles":
        return found.score_quantiles.exp2()
    if name == "entropy_variance":
        return found.entropy_variance + found.entropy.square()
    of_all: torch.Tensor = getattr(found, name)
    return of_all


# Ragged: 90 keys are a block of 64 and a part of one, three steps of 32 of four that there are.
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "window", "gqa", "alibi", "dense bias", "per head"),
        *("sink", "sink of masked rows", "causal padding uniform", "causal padding nan"),
        "prefix at run time",
    ],
)
def test_every_statistic_is_that_of_torch(name: str) -> None:
    problem = problem_of(name)
    assert_right(problem, *random_inputs(problem))


@pytest.mark.parametrize(("rows", "columns"), [(20, 150), (150, 64)])
def test_rows_stand_anywhere_among_more_or_fewer_keys(rows: int, columns: int) -> None:
    problem = problem_of("window", rows=rows, columns=columns)
    spec = dataclasses.replace(problem.spec, empty_row=EmptyRow.ZERO)
    problem = dataclasses.replace(problem, spec=spec)
    assert_right(problem, *random_inputs(problem), splits=3)


def test_statistics_of_half_precision_are_those_of_its_values() -> None:
    problem = problem_of("gqa", torch.float16)
    assert_right(problem, *random_inputs(problem))


def test_statistics_of_bfloat16_that_need_no_product_of_tiles() -> None:
    """The interpreter multiplies tiles of bfloat16 as if their bits were integers."""
    problem = problem_of("gqa", torch.bfloat16)
    given = random_inputs(problem)
    ours, eager = (by(problem, *given) for by in (by_triton, by_torch))
    exact = by_torch(problem, *map(in_float64, given))
    for name in ("q_max", "k_max", "v_max"):
        assert torch.equal(getattr(ours, name), getattr(eager, name))
    scores = (as_rounded(each, "score_quantiles") for each in (ours, eager, exact))
    assert_as_accurate(*scores)


def test_how_keys_are_divided_changes_no_bit() -> None:
    problem = problem_of("sink")
    given = random_inputs(problem)
    found, other = (by_triton(problem, *given, splits=splits) for splits in (1, 5))
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(other, name)), name


def test_scores_may_be_alike() -> None:
    problem = problem_of("causal")
    tensors, operands = random_inputs(problem)
    tensors[0] *= 0
    found = assert_right(problem, tensors, operands)
    counts = [row + 1 for row in sampled_rows(90, ROWS, TURN)]
    expected = torch.tensor(counts).float().log().mean()
    torch.testing.assert_close(found.entropy, expected.expand(2, 4))


def test_scores_may_be_large() -> None:
    """Weights of torch's are never below 1e-38: entropies near 0 differ."""
    problem = problem_of("causal")
    tensors, operands = random_inputs(problem)
    tensors[0] *= 1000
    ours, eager = (by(problem, tensors, operands) for by in (by_triton, by_torch))
    assert (ours.entropy >= 0).all()
    for name in FIELDS:
        found, right = as_rounded(ours, name), as_rounded(eager, name)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-3 if "score" in name else 1e-5)


def test_rows_without_a_key_do_not_count() -> None:
    problem = problem_of("plain")
    none = AttentionSpec(0.3, mask=sympy.Ge(q - k - 200, 0), empty_row=EmptyRow.NAN)
    problem = dataclasses.replace(problem, spec=none)
    found = assert_right(problem, *random_inputs(problem))
    of_rows = [name for name in FIELDS if name not in ("q_max", "k_max", "v_max")]
    assert all((getattr(found, name) == 0).all() for name in of_rows)


def test_a_bias_may_shut_keys_out() -> None:
    """Whole rows of it, too: the mask alone does not tell how many keys there are."""
    problem = problem_of("plain")
    spec = AttentionSpec(
        0.3, S + Load(0, q, k), empty_row=EmptyRow.NAN, operands=(OperandSpec("float", 2),)
    )
    problem = dataclasses.replace(problem, spec=spec, operand_shapes=((90, 90),))
    tensors, (bias,) = random_inputs(problem)
    bias[bias > 0.5] = float("-inf")
    bias[: sampled_rows(90, ROWS, TURN)[3] + 1] = float("-inf")
    assert_right(problem, tensors, [bias])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_as_it_does_in_torch(value: float) -> None:
    problem = problem_of("causal")
    tensors, operands = random_inputs(problem)
    tensors[1][0, 1, 0, 3] = value  # the first key: every row attends to it
    tensors[2][1, 2, 5, 0] = value
    ours, eager = (by(problem, tensors, operands) for by in (by_triton, by_torch))
    assert ours.entropy.isnan().nonzero().tolist() == [[0, 1]]
    for name in FIELDS:
        found, right = getattr(ours, name), getattr(eager, name)
        torch.testing.assert_close(found, right, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_nan_of_keys_that_no_row_attends_to_is_not_seen() -> None:
    problem = problem_of("padding")
    tensors, (keep,) = random_inputs(problem)
    whole = by_triton(problem, tensors, [keep])
    tensors[1].masked_fill_(~keep[:, None, :, None], float("nan"))
    found = by_triton(problem, tensors, [keep])
    assert torch.equal(found.entropy, whole.entropy)
    assert torch.equal(found.score_quantiles, whole.score_quantiles)
    assert found.k_max.isnan().all()


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize(("rows", "count"), [(1, 32), (90, 12), (4097, 32), (100003, 128)])
def test_rows_are_the_same_when_made_on_a_device(rows: int, count: int, turn: int) -> None:
    made = sampled_places(torch.empty(0), rows, count, turn)
    assert made.tolist() == sampled_rows(rows, count, turn)


# -- what there is no kernel for -------------------------------------------------------------------


def refused(problem: Problem, dtype: torch.dtype, params: tuple[object, ...] = ()) -> str | None:
    tensors, operands = random_inputs(problem)
    pair = [t.to(dtype) for t in tensors[:2]]
    return refusal_of_form(*pair, operands, params, problem.spec)  # type: ignore[arg-type]


def test_what_has_no_kernel_is_refused_with_its_reason() -> None:
    problem = problem_of("plain")
    assert refused(problem, torch.float32) is None
    assert refused(problem, torch.float64) == "not for torch.float64 and torch.float64"
    assert refused(problem, torch.float32, (0.5,)) == (
        "a run-time number that is no integer, and no operand"
    )
    wide = dataclasses.replace(
        problem, shape=dataclasses.replace(problem.shape, head_dim=257, value_dim=257)
    )
    assert refused(wide, torch.bfloat16) == "not for head dimensions above 256"
    sine = dataclasses.replace(problem, spec=AttentionSpec(0.3, sympy.sin(S)))
    assert refused(sine, torch.float32) == "no code for sin(S)"


def test_operand_without_a_form_is_refused() -> None:
    problem = problem_of("alibi")
    tensors, _ = random_inputs(problem)
    strange = [torch.zeros(4, dtype=torch.complex64)]
    reason = refusal_of_form(*tensors[:2], strange, (), problem.spec)
    assert reason == "no Triton type for torch.complex64"


@pytest.mark.parametrize("tiles", [Tiles(8, 32), Tiles(16, 48)])
def test_tiles_that_hold_no_block_are_refused(tiles: Tiles) -> None:
    problem = problem_of("plain")
    (q_, k_, _), _ = random_inputs(problem)
    with pytest.raises(ValueError, match="keys that divide 64"):
        row_statistics(q_, k_, [], (), problem.spec, rows=4, turn=0, tiles=tiles, splits=1)


# -- ranks -----------------------------------------------------------------------------------------


# Rows are two blocks of 16; keys are divided among programs where some rows have none.
@pytest.mark.parametrize("name", ["gqa", "sink of masked rows", "causal padding uniform"])
def test_products_of_rows_are_those_of_torch(name: str) -> None:
    problem = problem_of(name)
    (q_, k_, _), operands = random_inputs(problem)
    params, spec = problem.param_hints, problem.spec
    ours = row_products_by_tiles(
        q_, k_, operands, params, spec, rows=18, turn=1, tiles=TILES, splits=2
    )
    eager = row_products(q_, k_, spec, operands, params, rows=18, turn=1)
    wide = in_float64([q_, k_]), in_float64(operands)
    exact = row_products(*wide[0], spec, wide[1], params, rows=18, turn=1)
    assert torch.equal(ours, ours.mT)
    assert_as_accurate(ours, eager, exact)


def test_products_of_rows_show_what_is_not_finite() -> None:
    problem = problem_of("plain", rows=33, columns=33)
    (q_, k_, _), _ = random_inputs(problem)
    q_[0, 1, 20, 0] = float("nan")
    given = (q_, k_, [], (), problem.spec)
    found = row_products_by_tiles(*given, rows=33, turn=0, tiles=Tiles(64, 32), splits=1)
    expected = torch.zeros(2, 4, 33, 33, dtype=torch.bool)
    expected[0, 1, 20], expected[0, 1, :, 20] = True, True
    assert torch.equal(found.isnan(), expected)


def test_spectrum_is_the_same_by_the_forward_kernel() -> None:
    """P X of randomized SVD is attention with values X, whatever computes attention."""
    problem = problem_of("alibi", rows=33, columns=33)
    (q_, k_, _), operands = random_inputs(problem)
    exact = functools.partial(
        forward, made_for(one_head_spec(problem.spec), operands), tiles=Tiles(32, 32)
    )
    given = (q_, k_, problem.spec, operands)
    ours = attention_spectrum(*given, rank=4, power=0, exact=exact)
    by_torch_functions = attention_spectrum(*given, rank=4, power=0)
    torch.testing.assert_close(ours.values, by_torch_functions.values, rtol=1e-5, atol=1e-6)
