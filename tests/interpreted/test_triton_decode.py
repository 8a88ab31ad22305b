"""The generated Triton kernels for few rows, in Triton's interpreter, against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sympy
import torch
from check import assert_as_accurate
from specs import SPECS, oracle, problem_of, random_inputs

from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.triton.launch import Products, Tiles
from adaattn_compiler.kernels.triton.launch_decode import decode, splits_for, tiles_for_few_rows
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, OperandSpec, h, k, param, q

SMALL = Tiles(16, 16)
# The last rows of a cache, as in decoding.
CAUSAL = sympy.Ge(q + N - M - k, 0)


def window(width: int) -> Any:
    return sympy.And(CAUSAL, sympy.Ge(k - q - N + M + width - 1, 0))


def configured(problem: Problem) -> Configuration:
    names = (str(o.dtype).removeprefix("torch.") for o in random_inputs(problem)[1])
    return Configuration(problem.spec, tuple(names))


def through(problem: Problem, splits: int, tiles: Tiles = SMALL, **given: Any) -> torch.Tensor:
    tensors, operands = random_inputs(problem)
    made_for, params = configured(problem), problem.param_hints
    return decode(made_for, *tensors, operands, params, splits=splits, tiles=tiles, **given)


def few_rows(
    spec: AttentionSpec, rows: int, columns: int, *shapes: tuple[int, ...], params: Any = ()
) -> Problem:
    problem = problem_of("plain", rows=rows, columns=columns)
    shape = dataclasses.replace(
        problem.shape, batch=1, kv_heads=4 // spec.group, hints=(1, rows, columns)
    )
    return dataclasses.replace(
        problem, spec=spec, shape=shape, operand_shapes=shapes, param_hints=params
    )


def assert_right(problem: Problem, splits: int, tiles: Tiles = SMALL, **given: Any) -> None:
    dtype = problem.dtype
    exact, eager = oracle(problem, torch.float64), oracle(problem, dtype)
    assert_as_accurate(through(problem, splits, tiles, **given), eager, exact)


@pytest.mark.parametrize(
    ("name", "dtype", "splits"),
    [
        *((name, torch.float32, 1 + 2 * (i % 2)) for i, name in enumerate(SPECS)),
        *((name, torch.float32, 3) for name in ("causal padding uniform", "per head")),
        *((name, torch.float16, 3) for name in ("gqa", "last rows", "sink")),
    ],
    ids=str,
)
def test_feature_is_as_accurate_as_eager(name: str, dtype: torch.dtype, splits: int) -> None:
    problem = problem_of(name, dtype, rows=2)
    if name == "dense bias":
        problem = dataclasses.replace(problem, operand_shapes=((1, 4, 2, 90),))
    assert_right(problem, splits, Tiles(16, 32))


MASKS = {
    "last rows": CAUSAL,
    "window": window(20),
    "prefix and window": sympy.Or(window(20), sympy.Lt(k, 18)),
    "window and data": sympy.And(window(40), sympy.Ne(Load(0, k), 0)),
    "of a head": sympy.Or(window(20), sympy.Ge(h - 2, 0)),
    "chunk": sympy.Eq(sympy.floor(k / 24), sympy.floor((q + N - M) / 24)),
    "until a number": sympy.And(CAUSAL, sympy.Ge(param(0) - k, 0)),
}


@pytest.mark.parametrize("name", MASKS)
def test_keys_of_a_mask_are_found(name: str) -> None:
    mask = MASKS[name]
    reads = mask.has(Load)
    spec = AttentionSpec(
        0.3,
        mask=mask,
        empty_row=EmptyRow.ZERO,
        group=2,
        operands=(OperandSpec("bool", 1),) * reads,
        params=1,
    )
    assert_right(few_rows(spec, 2, 97, *((97,),) * reads, params=(61,)), 3)


@pytest.mark.parametrize("columns", [63, 64, 65, 79])
def test_window_is_exact_at_its_ends(columns: int) -> None:
    for width in (16, 17):
        assert_right(few_rows(AttentionSpec(0.3, mask=window(width), group=4), 1, columns), 1)


def test_keys_outside_a_window_are_not_read() -> None:
    problem = few_rows(AttentionSpec(0.3, mask=window(20), group=4), 3, 100)
    tensors, _ = random_inputs(problem)
    known = through(problem, 3)
    for tensor in tensors[1:]:
        tensor[:, :, :64] = float("nan")  # the first attended is the 78th, of the block from 64
    assert torch.equal(decode(configured(problem), *tensors, [], splits=3, tiles=SMALL), known)


@pytest.mark.parametrize("keys", [(0, 70), (17, 33)])
def test_keys_outside_given_bounds_are_not_read(keys: tuple[int, int]) -> None:
    first, last = keys
    spec = AttentionSpec(0.3, mask=sympy.Ne(Load(0, k), 0), operands=(OperandSpec("bool", 1),))
    problem = few_rows(spec, 2, 90, (90,))
    tensors, operands = random_inputs(problem)
    operands[0][:] = (torch.arange(90) >= first) & (torch.arange(90) < last)
    exact = reference_attention(*(t.double() for t in tensors), operands, (), spec)
    eager = reference_attention(*tensors, operands, (), spec)
    for tensor in tensors[1:]:
        tensor[:, :, : first // 16 * 16] = float("nan")
        tensor[:, :, -(-last // 16) * 16 :] = float("nan")
    made_for = configured(problem)
    ours = decode(made_for, *tensors, operands, splits=2, tiles=SMALL, keys=keys)
    assert_as_accurate(ours, eager, exact)
    assert decode(made_for, *tensors, operands, splits=1, tiles=SMALL).isnan().any()


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits_make_no_difference(splits: int) -> None:
    # Five blocks of keys: some splits have none.
    problem = problem_of("sink", rows=2, columns=70)
    lse, one = (torch.full((2, 4, 2), 7.0) for _ in range(2))
    assert_right(problem, splits, lse=lse)
    through(problem, 1, lse=one)
    assert torch.allclose(lse, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "group", "rows", "columns"),
    [
        (16, 16, 4, 1, 1),
        (40, 24, 4, 5, 65),
        (72, 128, 2, 8, 33),
        (33, 7, 1, 16, 3),
        (16, 40, 4, 4, 50),
    ],
)
def test_any_dimensions_groups_and_lengths_are_right(
    head_dim: int, value_dim: int, group: int, rows: int, columns: int
) -> None:
    spec = AttentionSpec(0.3, mask=CAUSAL, empty_row=EmptyRow.ZERO, group=group)
    problem = few_rows(spec, rows, columns)
    shape = dataclasses.replace(problem.shape, head_dim=head_dim, value_dim=value_dim)
    assert_right(dataclasses.replace(problem, shape=shape), 2)


@pytest.mark.parametrize("empty", [(0, 90), (1, 0)])
@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_is_nothing(empty: tuple[int, int], splits: int) -> None:
    problem = problem_of("sink of masked rows", rows=empty[0], columns=empty[1])
    assert torch.equal(through(problem, splits), oracle(problem, torch.float32))


@pytest.mark.parametrize("empty_row", [EmptyRow.ZERO, EmptyRow.NAN, EmptyRow.UNIFORM])
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_without_a_key_end_as_the_spec_has_them(empty_row: EmptyRow, splits: int) -> None:
    # The first of three rows sees no key.
    mask = sympy.And(sympy.Ge(q - 1, 0), sympy.Ge(k - 40, 0))
    spec = AttentionSpec(0.3, mask=mask, empty_row=empty_row, group=2)
    problem = few_rows(spec, 3, 90)
    lse = torch.empty(1, 4, 3)
    assert_right(problem, splits, lse=lse)
    assert torch.equal(lse == float("-inf"), torch.tensor([True, False, False]).expand(1, 4, 3))


def test_log_sum_exp_is_that_of_the_scores() -> None:
    problem = few_rows(AttentionSpec(0.3, mask=CAUSAL, group=2), 3, 90)
    lse = torch.empty(1, 4, 3)
    through(problem, 4, lse=lse)
    q_BHMD, k_BGND = (tensor.double() for tensor in random_inputs(problem)[0][:2])
    scores = 0.3 * q_BHMD @ k_BGND.repeat_interleave(2, 1).mT
    keep = torch.arange(90) <= torch.arange(87, 90)[:, None]
    exact = scores.masked_fill(~keep, float("-inf")).logsumexp(-1)
    assert torch.allclose(lse.double(), exact, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 3])
def test_strided_inputs_are_read_where_they_lie(splits: int) -> None:
    problem = problem_of("gqa", rows=3)
    tensors, _ = random_inputs(problem)
    q_, k_, v = (torch.cat([t, t], -1).repeat_interleave(2, 2)[:, :, ::2, :16] for t in tensors)
    ours = decode(Configuration(problem.spec), q_, k_, v, [], splits=splits, tiles=SMALL)
    assert torch.equal(ours, through(problem, splits))


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_comes_through(where: str) -> None:
    problem = few_rows(AttentionSpec(0.3), 3, 50)
    tensors, _ = random_inputs(problem)
    tensors["qkv".index(where)][0, 1, 2, 5] = float("nan")
    ours = decode(Configuration(problem.spec), *tensors, [], splits=3, tiles=SMALL)
    eager = reference_attention(*tensors, [], (), problem.spec)
    assert eager.isnan().any()
    assert torch.equal(ours.isnan(), eager.isnan())


def test_products_of_half_precision_are_those_of_rounded_factors() -> None:
    problem = problem_of("gqa", rows=3)
    ours = through(problem, 3, precision=Products("fp16", "ieee"))
    tensors = [t.half().float() if i < 2 else t for i, t in enumerate(random_inputs(problem)[0])]
    exact = reference_attention(*(t.double() for t in tensors), [], (), problem.spec)
    assert_as_accurate(ours, reference_attention(*tensors, [], (), problem.spec), exact)


def test_splits_fill_a_device_and_no_more() -> None:
    assert splits_for(1, 8, 8192, 132) == 32  # 256 keys each
    assert splits_for(1, 8, 1 << 20, 132) == 33
    assert splits_for(64, 8, 8192, 132) == 1
    assert splits_for(1, 1, 100, 132) == 1
    assert splits_for(0, 8, 0, 132) == 1


def test_tiles_hold_the_rows_of_a_key_head() -> None:
    assert tiles_for_few_rows(1, 128, 2).rows == 16
    assert tiles_for_few_rows(17, 128, 2).rows == 32
    assert tiles_for_few_rows(500, 256, 2).rows == 64
    assert tiles_for_few_rows(500, 128, 4).rows == 16
