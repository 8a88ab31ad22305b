"""Blocks screened out by products of 8 bits: with and without them results are the same."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.cpu import library as libraries
from adaattn_compiler.kernels.cpu.call import SCORES_IN_BFLOAT16, STEP_BLOCKS, Plan
from adaattn_compiler.kernels.cpu.plans import BLOCK, Order, lists_by_head
from adaattn_compiler.kernels.cpu.runner import CppRunner
from adaattn_compiler.kernels.cpu.source import Configuration
from adaattn_compiler.kernels.patterns import nearest_first
from adaattn_compiler.spec import AttentionSpec, EmptyRow, M, N, S, k, q

HEADS, GROUP = 4, 2
PLAIN = AttentionSpec(0.25, group=GROUP)
CAUSAL = dataclasses.replace(PLAIN, mask=sympy.Ge(q + N - M - k, 0), empty_row=EmptyRow.ZERO)
WINDOW = dataclasses.replace(CAUSAL, mask=sympy.And(CAUSAL.mask, sympy.Ge(k - q - N + M + 400, 0)))
ODD_SCALE = dataclasses.replace(CAUSAL, scale=0.1)
CAPPED = dataclasses.replace(CAUSAL, score=20 * sympy.tanh(S / 20))
FLAG = "-mavx512vnni"

needs_it = pytest.mark.skipif(
    FLAG not in libraries.machine_flags(), reason="this machine does not multiply 8 bits"
)


def runners(
    spec: AttentionSpec, dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[CppRunner, CppRunner]:
    """(with the instruction, without)."""
    made_for = Configuration(spec, dtype, dim, dim, (), dtype == "float32")
    screening = CppRunner(made_for)
    flags = tuple(flag for flag in libraries.machine_flags() if flag != FLAG)
    monkeypatch.setattr(libraries, "machine_flags", lambda: flags)
    return screening, CppRunner(made_for)


def plan_of(spec: AttentionSpec, sizes: tuple[int, int], skip: float, mode: int) -> Plan:
    structure = block_structure(spec.mask, *sizes, *BLOCK, ())
    seen = structure.partial | structure.full
    seen = seen.expand(-(-sizes[0] // BLOCK[0]), -(-sizes[1] // BLOCK[1]))[None, None]
    order = Order(torch.ones(1, dtype=torch.bool), nearest_first(*sizes))
    lists = lists_by_head(seen, structure.partial, order)
    return Plan(
        *lists,
        modes=torch.full((1, 1), mode, dtype=torch.int32),
        skip=torch.full((1, 1), skip),
    )


def tensors(
    rows: int, columns: int, dim: int, sharp: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neighbouring keys are alike; each head's scores are spread more than the one's before."""
    generator = torch.Generator().manual_seed(rows + dim)
    walk = torch.randn(1, HEADS // GROUP, columns, dim, generator=generator)
    smooth = (
        walk
        + 2 * walk.unfold(2, 1, 1)[..., 0].cumsum(2) / (1 + torch.arange(columns)).sqrt()[:, None]
    )
    q_BHMD = torch.randn(1, HEADS, rows, dim, generator=generator)
    q_BHMD = q_BHMD * sharp * torch.arange(1, HEADS + 1).view(-1, 1, 1)
    return q_BHMD, smooth, torch.randn(1, HEADS // GROUP, columns, dim, generator=generator)


def assert_alike(
    pair: tuple[CppRunner, CppRunner],
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    plan: Plan,
) -> int:
    """How many blocks rows skipped, the same with and without screening, as is the result."""
    found = []
    for runner in pair:
        counts = torch.zeros(1, HEADS, dtype=torch.int64)
        found.append((runner(*qkv, (), (), plan, skipped=counts), counts))
    (screened, count), (plain, expected) = found
    assert torch.equal(screened, plain)
    assert torch.equal(count, expected)
    return int(count.sum())


@needs_it
@pytest.mark.parametrize(
    ("spec", "dim", "dtype"),
    [
        (PLAIN, 64, "float32"),
        (CAUSAL, 40, "float32"),
        (WINDOW, 18, "float32"),
        (ODD_SCALE, 64, "bfloat16"),
        (CAPPED, 16, "float32"),
    ],
    ids=["plain", "causal", "window", "bfloat16", "capped"],
)
def test_results_are_the_same_without_it(
    spec: AttentionSpec, dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = runners(spec, dim, dtype, monkeypatch)
    skipped = 0
    for rows, columns in ((700, 700), (130, 1001)):
        for sharp in (0.3, 3.0, 30.0):
            qkv = tensors(rows, columns, dim, sharp)
            given = tuple(tensor.to(getattr(torch, dtype)) for tensor in qkv)
            for skip in (0.5, 6.0):
                for mode in (0, SCORES_IN_BFLOAT16) if dtype == "float32" else (0,):
                    plan = plan_of(spec, (rows, columns), skip, mode)
                    skipped += assert_alike(pair, given, plan)
    assert skipped > 0


@needs_it
@pytest.mark.parametrize(
    "given",
    ["outlier in keys", "outlier in queries", "zeros", "tiny", "huge", "constant", "ties"],
)
def test_numbers_that_8_bits_do_not_hold(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever 8 bits make of them, nothing is left out that counts."""
    pair = runners(CAUSAL, 32, "float32", monkeypatch)
    q_BHMD, k_BGND, v_BGNE = tensors(640, 640, 32, 2.0)
    if given == "outlier in keys":
        k_BGND[:, :, 100, 3] = 3e4
    elif given == "outlier in queries":
        q_BHMD[:, :, 500, 5] = 3e4
    elif given == "zeros":
        k_BGND[:, :, 64:320], q_BHMD[:, :, 400:] = 0, 0
    elif given == "tiny":
        k_BGND, q_BHMD = k_BGND * 1e-36, q_BHMD * 1e-4
    elif given == "huge":
        k_BGND, q_BHMD = k_BGND * 1e18, q_BHMD * 1e17
    elif given == "constant":
        k_BGND, q_BHMD = torch.ones_like(k_BGND), torch.ones_like(q_BHMD)
    else:  # scores that lie just at a threshold, for some rows
        k_BGND = (k_BGND * 2).round() / 2
        q_BHMD = q_BHMD.round()
    for skip in (1e-3, 1.0, 8.0):
        for mode in (0, SCORES_IN_BFLOAT16):
            plan = plan_of(CAUSAL, (640, 640), skip, mode)
            assert_alike(pair, (q_BHMD, k_BGND, v_BGNE), plan)


@needs_it
@pytest.mark.parametrize("small", ["queries", "keys"])
def test_squares_of_small_numbers_are_not_lost(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One large element makes all others 0 in whole numbers, and their squares are below any
    float: later keys score three times as high as the first ones, by those alone."""
    spec = dataclasses.replace(PLAIN, scale=0.125 if small == "queries" else 1e5)
    pair = runners(spec, 64, "float32", monkeypatch)
    tiny, outlier, huge = 2e-23, 6e-21, 8e23 if small == "queries" else 1e18
    own, other = (tiny, huge) if small == "queries" else (huge, tiny)
    q_BHMD = torch.full((1, HEADS, 64, 64), own)
    q_BHMD[..., 0] = outlier if small == "queries" else 0
    k_BGND = torch.zeros(1, HEADS // GROUP, 768, 64)
    k_BGND[:, :, :256, 1:21], k_BGND[:, :, 256:, 1:61] = other, other
    k_BGND[..., 0] = 0 if small == "queries" else outlier
    v_BGNE = torch.randn(k_BGND.shape, generator=torch.Generator().manual_seed(0))
    plan = plan_of(spec, (64, 768), 0.5, 0)
    ascending = lists_by_head(torch.ones(1, 1, 1, 12, dtype=torch.bool), torch.tensor(False))
    for lists in ((plan.offsets, plan.blocks), ascending):
        met = dataclasses.replace(plan, offsets=lists[0], blocks=lists[1])
        assert_alike(pair, (q_BHMD, k_BGND, v_BGNE), met)


@needs_it
def test_a_bias_by_key_is_not_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = runners(PLAIN, 64, "float32", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    bias = 20 * torch.randn(1, 1, 768, generator=generator)
    plan = dataclasses.replace(plan_of(PLAIN, (64, 768), 2.0, 0), key_bias=bias)
    assert assert_alike(pair, tensors(64, 768, 64, 0.3), plan) > 0


# -- the order in which blocks are met -------------------------------------------------------------


def test_nearest_blocks_come_first() -> None:
    order = nearest_first(640, 640)
    assert order[7].tolist() == [7, 6, 8, 5, 0, 9, 4, 3, 2, 1]
    causal = [block for block in order[7].tolist() if block <= 7]
    assert causal[:STEP_BLOCKS] == [7, 6, 5, 0]


def test_rows_stand_at_the_end_of_the_keys() -> None:
    order = nearest_first(65, 640)
    assert order[:, 0].tolist() == [8, 9]
    assert all(sorted(row) == list(range(10)) for row in order.tolist())


def test_tiles_of_other_sizes() -> None:
    assert nearest_first(128, 128, (64, 32))[1].tolist() == [2, 1, 3, 0]
    assert nearest_first(64, 128, (16, 64)).tolist() == [[1, 0]] * 4


def test_only_heads_that_skip_are_in_that_order() -> None:
    seen = torch.ones(4, 4, dtype=torch.bool).tril().expand(1, 2, 4, 4)
    partial = torch.eye(4, dtype=torch.bool)
    order = Order(torch.tensor([False, True]), nearest_first(256, 256))
    offsets, blocks = lists_by_head(seen, partial, order)
    plain_offsets, plain = lists_by_head(seen, partial)
    assert torch.equal(offsets, plain_offsets)
    first, second = blocks.chunk(2)
    assert torch.equal(first, plain.chunk(2)[0])
    assert second.tolist() == [1, 3, 0, 5, 2, 0, 7, 4, 2, 0]
