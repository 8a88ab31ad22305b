"""The generated Triton kernel, forward, in Triton's interpreter, against float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import sympy
import torch
from check import assert_as_accurate
from specs import SPECS, oracle, problem_of, random_inputs

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.triton.launch import Tiles, forward
from adaattn_compiler.kernels.triton.launch_decode import decode
from adaattn_compiler.kernels.triton.plan import configuration_of
from adaattn_compiler.kernels.triton.source import Configuration, fold
from adaattn_compiler.kernels.triton.tables import BlockTable, block_table
from adaattn_compiler.spec import AttentionSpec, EmptyRow, S, Where, k, param, q

SMALL = Tiles(64, 32)


def through(problem: Problem, table: BlockTable | None = None) -> torch.Tensor:
    tensors, operands = random_inputs(problem)
    dtypes = tuple(str(o.dtype).removeprefix("torch.") for o in operands)
    made_for = Configuration(problem.spec, dtypes)
    return forward(made_for, *tensors, operands, problem.param_hints, tiles=SMALL, table=table)


def table_of(problem: Problem) -> BlockTable:
    _, *sizes = problem.shape.hints
    blocks = (SMALL.rows, SMALL.keys)
    structure = block_structure(problem.spec.mask, *sizes, *blocks, problem.param_hints)
    return block_table(structure, ragged=sizes[1] % SMALL.keys != 0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SPECS),
        *((name, torch.float16) for name in ("gqa", "alibi", "sink", "causal padding uniform")),
    ],
    ids=str,
)
def test_feature_is_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    problem = problem_of(name, dtype)
    assert_as_accurate(through(problem), oracle(problem, dtype), oracle(problem, torch.float64))


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "rows", "columns"),
    [(16, 16, 1, 1), (40, 24, 33, 65), (72, 128, 31, 64), (128, 16, 1, 130), (33, 7, 70, 3)],
)
def test_any_dimensions_and_lengths_are_right(
    head_dim: int, value_dim: int, rows: int, columns: int
) -> None:
    problem = problem_of("last rows", rows=rows, columns=columns)
    shape = dataclasses.replace(problem.shape, head_dim=head_dim, value_dim=value_dim)
    # Rows before the first key have none.
    spec = dataclasses.replace(problem.spec, empty_row=EmptyRow.ZERO)
    problem = dataclasses.replace(problem, shape=shape, spec=spec)
    exact, eager = oracle(problem, torch.float64), oracle(problem, torch.float32)
    assert_as_accurate(through(problem), eager, exact)


@pytest.mark.parametrize(
    "name", ["plain", "causal", "window", "softcap", "dense bias", "last rows"]
)
def test_lengths_that_blocks_divide(name: str) -> None:
    if name == "dense bias":
        problem = problem_of(name)
        shape = dataclasses.replace(problem.shape, columns=64, hints=(2, 90, 64))
        sizes = ((*problem.operand_shapes[0][:-1], 64),)
        problem = dataclasses.replace(problem, shape=shape, operand_shapes=sizes)
    else:
        problem = problem_of(name, rows=70, columns=128)
    exact, eager = oracle(problem, torch.float64), oracle(problem, torch.float32)
    assert_as_accurate(through(problem), eager, exact)


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
@pytest.mark.parametrize("score", [S, 5 * sympy.tanh(S / 5)], ids=["plain", "softcap"])
def test_scores_may_be_turned_around_or_large(scale: float, score: sympy.Expr) -> None:
    spec = AttentionSpec(scale, score, sympy.Ge(q - k, 0))
    problem = dataclasses.replace(problem_of("plain"), spec=spec)
    exact, eager = oracle(problem, torch.float64), oracle(problem, torch.float32)
    assert_as_accurate(through(problem), eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_capped_scores_are_as_accurate_as_eager(dtype: torch.dtype, size: float) -> None:
    # At 100 most lie near the cap, where its size tells.
    spec = AttentionSpec(0.25, 50 * sympy.tanh(S / 50), sympy.Ge(q - k, 0))
    problem = dataclasses.replace(problem_of("plain", dtype), spec=spec)
    tensors, operands = random_inputs(problem)
    tensors[:2] = (size * tensor for tensor in tensors[:2])
    made_for = configuration_of(problem)
    assert made_for.halves == (dtype == torch.float16)
    out = forward(made_for, *tensors, operands, tiles=SMALL)
    exact, eager = (
        reference_attention(*(t.to(to) for t in tensors), [], (), spec)
        for to in (torch.float64, dtype)
    )
    assert_as_accurate(out, eager, exact)


def test_rows_filled_with_the_least_float_keep_their_weights() -> None:
    least = torch.finfo(torch.float32).min
    spec = AttentionSpec(0.3, Where(sympy.Ge(q, 10), S, sympy.Float(least)))
    assert fold(spec) == 1
    problem = dataclasses.replace(problem_of("plain"), spec=spec)
    exact, eager = oracle(problem, torch.float64), oracle(problem, torch.float32)
    assert_as_accurate(through(problem), eager, exact)
    assert torch.isfinite(through(problem)).all()


def test_scores_are_folded_where_none_can_be_near_the_largest_float() -> None:
    assert fold(SPECS["causal"][0]) == pytest.approx(0.3 / math.log(2))
    assert fold(SPECS["softcap"][0]) == pytest.approx(1 / math.log(2))
    for name in ("dense bias", "alibi", "distance"):  # what is read may be as large as floats are
        assert fold(SPECS[name][0]) == 1
    for scale in (0.0, -0.3):  # the largest score is not that of the largest product
        assert fold(AttentionSpec(scale)) == 1
    filled = Where(sympy.Ge(q - k, 0), S, param(0))
    assert fold(AttentionSpec(0.3, filled, params=1)) == 1  # by what is known in the call only


@pytest.mark.parametrize("number", [-1e4, -1e6, -1e7, -1e9, -1e10, -1e30])
def test_filled_rows_keep_their_weights_where_products_are_not_rounded(number: float) -> None:
    # As compiled: the product in `score * FOLD - m_safe` has all its digits.
    fold_ = np.float32(fold(AttentionSpec(0.3, Where(sympy.Ge(q, 10), S, sympy.Float(number)))))
    m_safe = np.float32(np.float32(number) * fold_)
    x = np.float64(np.float32(number)) * np.float64(fold_) - np.float64(m_safe)
    assert 2.0 ** abs(x) < 1.1


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_scales_may_be_no_numbers(scale: float) -> None:
    problem = dataclasses.replace(problem_of("plain"), spec=AttentionSpec(scale))
    assert torch.equal(through(problem).isnan(), oracle(problem, torch.float32).isnan())


@pytest.mark.parametrize("empty", [(0, 90), (90, 0)])
def test_nothing_is_nothing(empty: tuple[int, int]) -> None:
    problem = problem_of("sink of masked rows", rows=empty[0], columns=empty[1])
    assert torch.equal(through(problem), oracle(problem, torch.float32))


def test_full_blocks_that_do_not_follow_each_other() -> None:
    # The first keys, and every other chunk.
    chunks = sympy.Eq(sympy.Mod(sympy.floor(k / 32), 2), 0)
    spec = AttentionSpec(0.3, mask=sympy.Or(chunks, sympy.Lt(k, 40)))
    problem = dataclasses.replace(problem_of("plain", columns=150), spec=spec)
    table = table_of(problem)
    assert not table.full_run
    exact, eager = oracle(problem, torch.float64), oracle(problem, torch.float32)
    assert_as_accurate(through(problem, table), eager, exact)
    assert_as_accurate(through(problem), eager, exact)


@pytest.mark.parametrize("name", ["window", "causal padding nan", "prefix at run time"])
def test_table_and_closed_form_are_alike(name: str) -> None:
    problem = problem_of(name)
    by_table, by_form = through(problem, table_of(problem)), through(problem)
    assert torch.allclose(by_table, by_form, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["causal", "sink", "sink of masked rows", "causal padding nan"])
def test_log_sum_exp_is_that_of_the_scores(name: str) -> None:
    problem = problem_of(name)
    tensors, operands = random_inputs(problem)
    dtypes = tuple(str(o.dtype).removeprefix("torch.") for o in operands)
    lse = torch.empty(2, 4, 90)
    forward(Configuration(problem.spec, dtypes), *tensors, operands, tiles=SMALL, lse=lse)
    q_BHMD, k_BGND = (tensor.double() for tensor in tensors[:2])
    k_BHND = k_BGND.repeat_interleave(problem.spec.group, 1)
    scores = problem.spec.scale * q_BHMD @ k_BHND.mT
    values = positions((problem.spec.mask,), scores, (2, 4, 90, 90))
    keep = evaluate_dense(problem.spec.mask, values, operands, ())
    scores = scores.masked_fill(~keep, float("-inf"))
    if problem.spec.sink is not None:
        scores = torch.cat([scores, operands[0].double()[:, None, None].expand(2, 4, 90, 1)], -1)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-5)


def test_strided_inputs_are_read_where_they_lie() -> None:
    problem = problem_of("gqa", rows=40, columns=40)
    tensors, _ = random_inputs(problem)
    q, k_, v = (torch.cat([t, t], -1).repeat_interleave(2, 2)[:, :, ::2, :16] for t in tensors)
    ours = forward(Configuration(problem.spec), q, k_, v, [], tiles=SMALL)
    assert torch.equal(ours, through(problem))
    one_row = k_[:, :, :1].expand(k_.shape)
    same = forward(Configuration(problem.spec), q, one_row.contiguous(), v, [], tiles=SMALL)
    assert torch.equal(forward(Configuration(problem.spec), q, one_row, v, [], tiles=SMALL), same)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_comes_through(where: str) -> None:
    problem = problem_of("causal", rows=40, columns=40)
    tensors, _ = random_inputs(problem)
    tensors["qkv".index(where)][0, 1, 20] = float("nan")
    ours = forward(Configuration(problem.spec), *tensors, [], tiles=SMALL)
    eager = reference_attention(*tensors, [], (), problem.spec)
    rows_of_nan = eager.isnan().any(-1)
    assert rows_of_nan.any()
    assert torch.equal(ours.isnan().any(-1), rows_of_nan)


@pytest.mark.parametrize("number", [2**31 - 1, -(2**31), 2**62])
def test_numbers_of_run_time_may_be_as_large_as_they_like(number: int) -> None:
    masks = (
        sympy.Ge(k - q + param(0), 0),
        sympy.Or(sympy.Ge(q - k, 0), sympy.Ge(param(0) - k, 0)),
        sympy.And(sympy.Ge(q - k, 0), sympy.Ge(k - param(0), 0)),
    )
    for mask in masks:
        spec = AttentionSpec(0.3, mask=mask, empty_row=EmptyRow.ZERO, params=1)
        shape = Shape(1, 1, 1, 40, 40, 16, 16, (1, 40, 40))
        problem = Problem(spec, shape, torch.float32, "cpu", False, (), (number,))
        exact, eager = oracle(problem, torch.float64), oracle(problem, torch.float32)
        assert_as_accurate(through(problem), eager, exact)
        tensors, _ = random_inputs(problem)
        few = decode(Configuration(spec), *tensors, [], (number,), splits=2)
        assert_as_accurate(few, eager, exact)


@pytest.mark.parametrize("name", ["gqa", "last rows"])
def test_tiles_by_descriptors_are_the_same(name: str) -> None:
    problem = problem_of(name)
    tensors, operands = random_inputs(problem)
    made_for = Configuration(problem.spec, tuple("float32" for _ in operands))
    given = (made_for, *tensors, operands)
    plain = forward(*given, tiles=SMALL)
    assert torch.equal(forward(*given, tiles=SMALL, by_descriptor=True), plain)


@pytest.mark.parametrize("programs", [3, 50])
def test_programs_that_take_tiles_in_turn_make_the_same(programs: int) -> None:
    problem = problem_of("gqa")
    tensors, _ = random_inputs(problem)
    given = (Configuration(problem.spec), *tensors, [])
    plain = forward(*given, tiles=SMALL)
    assert torch.equal(forward(*given, tiles=SMALL, programs=programs), plain)


def test_descriptors_want_rows_at_multiples_of_16_bytes() -> None:
    problem = problem_of("causal")
    (q, k_, v), _ = random_inputs(problem)
    odd = torch.cat([k_, k_[..., :1]], -1)[..., :16]
    with pytest.raises(ValueError, match="descriptors need multiples of 4 elements"):
        forward(Configuration(problem.spec), q, odd, v, [], by_descriptor=True)
