"""Counted work against what can be counted by hand, and bounds that must hold."""

from __future__ import annotations

import pytest
import sympy
import torch
from specs import CAUSAL

from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.roofline import eager_bytes, work_of
from adaattn_compiler.spec import AttentionSpec, Load, OperandSpec, S, h, k, q
from adaattn_compiler.target import TARGETS, cpu_target

H100 = TARGETS["H100"]


def problem_of(
    spec: AttentionSpec,
    rows: int,
    columns: int,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    operands: tuple[tuple[int, ...], ...] = (),
) -> Problem:
    heads = 16
    hints = (batch, rows, columns)
    shape = Shape(batch, heads, heads // spec.group, rows, columns, head_dim, head_dim, hints)
    return Problem(spec, shape, dtype, "cuda", False, operands)


def test_dense_attention_is_counted_whole() -> None:
    work = work_of(problem_of(AttentionSpec(0.1), 1024, 2048), 128, 64)
    scores = 2 * 16 * 1024 * 2048
    assert work.exponentials == scores
    assert work.operations == scores * 4 * 128
    assert work.least_bytes == 2 * 16 * (1024 + 2048) * 256 * 2
    assert work.tile_bytes == 2 * 16 * (1024 + 8 * 2048) * 256 * 2


def test_masked_blocks_cost_nothing() -> None:
    causal = work_of(problem_of(AttentionSpec(0.1, mask=CAUSAL), 4096, 4096), 128, 128)
    blocks = 4096 // 128
    assert causal.exponentials == 2 * 16 * 128 * 128 * blocks * (blocks + 1) / 2
    window = sympy.And(CAUSAL, sympy.Lt(q - k, 256))
    narrow = work_of(problem_of(AttentionSpec(0.1, mask=window), 4096, 4096), 128, 128)
    assert narrow.operations < causal.operations / 5
    assert narrow.least_bytes == causal.least_bytes


def test_biases_are_read_as_they_are() -> None:
    slopes = AttentionSpec(0.1, S + (k - q) * Load(0, h), operands=(OperandSpec("float", 1),))
    dense = AttentionSpec(0.1, S + Load(0, 0, h, q, k), operands=(OperandSpec("float", 4),))
    plain = work_of(problem_of(AttentionSpec(0.1), 512, 512), 128, 64)
    by_slope = work_of(problem_of(slopes, 512, 512, operands=((16,),)), 128, 64)
    by_tensor = work_of(problem_of(dense, 512, 512, operands=((1, 16, 512, 512),)), 128, 64)
    assert by_slope.least_bytes == plain.least_bytes + 16 * 4
    assert by_tensor.least_bytes == plain.least_bytes + 16 * 512 * 512 * 4


def test_time_is_that_of_the_longest() -> None:
    long = work_of(problem_of(AttentionSpec(0.1), 16384, 16384), 128, 64)
    assert long.seconds(H100) == long.operations / H100.rate("bfloat16")
    decode = work_of(problem_of(AttentionSpec(0.1, group=4), 1, 16384), 16, 64)
    assert decode.seconds(H100) == decode.least_bytes / H100.bandwidth
    # Heads of 64 keep the exponential unit as busy as the tensor cores.
    small = work_of(problem_of(AttentionSpec(0.1), 16384, 16384, head_dim=64), 128, 128)
    assert small.exponentials / H100.exponentials == pytest.approx(small.seconds(H100), rel=0.02)
    single = work_of(problem_of(AttentionSpec(0.1), 2048, 2048, dtype=torch.float32), 64, 64)
    assert single.seconds(cpu_target(2)) > 100 * single.seconds(H100)


def test_keys_that_fit_into_no_cache_are_read_again() -> None:
    short = work_of(problem_of(AttentionSpec(0.1), 65536, 8192), 128, 64)
    assert short.memory_bytes(H100) == short.least_bytes
    long = work_of(problem_of(AttentionSpec(0.1), 65536, 1 << 18), 128, 64)
    assert long.memory_bytes(H100) == long.tile_bytes > 100 * long.least_bytes


def test_scores_that_are_never_written_are_most_of_the_traffic() -> None:
    problem = problem_of(AttentionSpec(0.1, mask=CAUSAL), 8192, 8192, head_dim=64)
    assert eager_bytes(problem) > 100 * work_of(problem, 128, 64).least_bytes
