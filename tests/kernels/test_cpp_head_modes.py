"""Precision and skipping of each head in one call of the generated C++ kernel."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from check import assert_as_accurate

from adaattn_compiler.kernels.cpu.call import (
    SCORES_IN_BFLOAT16,
    STEP_BLOCKS,
    VALUES_IN_BFLOAT16,
    Plan,
)
from adaattn_compiler.kernels.cpu.plans import BLOCK
from adaattn_compiler.kernels.cpu.runner import CppRunner, cpp_runner, plan_of
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import reference_attention, skipping_attention
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Load,
    M,
    N,
    OperandSpec,
    S,
    b,
    h,
    k,
    q,
)

FLOAT, BRAIN = torch.float32, torch.bfloat16
BATCH, HEADS, GROUP = 2, 4, 2
BOTH = SCORES_IN_BFLOAT16 | VALUES_IN_BFLOAT16
LEADS = [(1, HEADS), (BATCH, 1), (BATCH, HEADS)]

PLAIN = AttentionSpec(0.25, group=GROUP)
CAUSAL = dataclasses.replace(PLAIN, mask=sympy.Ge(q - k, 0))
# Rows before the first key have none; the last see a part of the keys.
WINDOW = dataclasses.replace(
    PLAIN,
    mask=sympy.And(sympy.Ge(q + N - M - k, 0), sympy.Ge(k - q - N + M + 199, 0)),
    empty_row=EmptyRow.ZERO,
)
SINK = dataclasses.replace(CAUSAL, sink=Load(0, h), operands=(OperandSpec("float", 1),))
BIASED = dataclasses.replace(
    PLAIN, score=S + Load(0, b, h, k), operands=(OperandSpec("float", 3),), group=GROUP
)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def runner_of(
    spec: AttentionSpec,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = FLOAT,
    mixed: bool = True,
) -> CppRunner:
    shape = Shape(None, HEADS, HEADS // spec.group, None, None, *dims)
    return cpp_runner(plan_of(Problem(spec, shape, dtype, "cpu", False), mixed))


def random_qkv(
    rows: int, columns: int, dims: tuple[int, int] = (16, 16), batch: int = BATCH, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, dim, generator=generator)

    groups = HEADS // GROUP
    return (
        random(HEADS, rows, dims[0]),
        random(groups, columns, dims[0]),
        random(groups, columns, dims[1]),
    )


def whole_qkv(rows: int, columns: int, batch: int = BATCH, seed: int = 0) -> Tensors:
    """Whole numbers of few bits: all products are exact, in bfloat16 too, and so is what is
    skipped. Some rows' scores are spread far more than others', and so are some keys'."""
    generator = torch.Generator().manual_seed(seed)

    def whole(heads: int, length: int, most: int) -> torch.Tensor:
        size = (batch, heads, length, 16)
        numbers = torch.randint(-most, most + 1, size, generator=generator)
        return numbers.float()

    groups = HEADS // GROUP
    q_BHMD, k_BGND = whole(HEADS, rows, 3), whole(groups, columns, 2)
    spread = torch.randint(0, 3, (batch, groups, -(-columns // 64), 1), generator=generator)
    k_BGND *= spread.repeat_interleave(64, 2)[:, :, :columns]
    q_BHMD *= torch.randint(1, 5, (batch, HEADS, -(-rows // 9), 1), generator=generator).float()[
        :, :, torch.arange(rows) // 9
    ]
    return q_BHMD, k_BGND, whole(groups, columns, 50)


def blocks_of(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // BLOCK[0]), -(-columns // BLOCK[1])


def plan_with(met: torch.Tensor, **further: Any) -> Plan:
    """A plan of the blocks that are met, bool [B|1, H|1, row blocks, key blocks], each masked."""
    ends = met.sum(-1).flatten().cumsum(0).reshape(met.shape[:3])
    starts = ends - met.sum(-1)
    offsets = torch.cat([starts, ends[..., -1:]], -1).to(torch.int32)
    return Plan(offsets, (2 * met.nonzero()[:, -1] + 1).to(torch.int32), **further)


def every_block(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(1, 1, *blocks_of(rows, columns), dtype=torch.bool)


def random_blocks(lead: tuple[int, int], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    met = torch.rand(*lead, *blocks_of(rows, columns), generator=generator) > 0.3
    met[0, 0, 0] = False  # rows without a key
    return met


def int32(*numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# -- precision -------------------------------------------------------------------------------------


def assert_heads_are_as_alone(
    runner: CppRunner, qkv: Tensors, operands: Any, plan: Plan, modes: torch.Tensor
) -> None:
    """Each head of one call is, bit by bit, what it is where all heads are of its mode."""

    def result(modes: torch.Tensor) -> torch.Tensor:
        return runner(*qkv, operands, (), plan=dataclasses.replace(plan, modes=modes))

    alone = [result(int32([mode])) for mode in range(BOTH + 1)]
    ours = result(modes)
    of_heads = modes.expand(ours.shape[0], HEADS)
    for place, head in itertools.product(range(ours.shape[0]), range(HEADS)):
        assert torch.equal(ours[place, head], alone[of_heads[place, head]][place, head])


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dims", [(64, 64), (33, 40)])
def test_heads_of_any_precision_are_as_alone(lead: tuple[int, int], dims: tuple[int, int]) -> None:
    # Those of a group differ, and those of batch items.
    modes = (torch.arange(lead[0] * lead[1], dtype=torch.int32) * 3 % 4).reshape(lead)
    qkv = random_qkv(130, 300, dims)
    met = every_block(130, 300)
    assert_heads_are_as_alone(runner_of(WINDOW, dims), qkv, (), plan_with(met), modes)


@pytest.mark.parametrize("modes", list(itertools.product(range(4), repeat=2)))
def test_any_two_precisions_share_keys(modes: tuple[int, int]) -> None:
    qkv, met = random_qkv(70, 130), every_block(70, 130)
    ours = int32([*modes, 0, 0])
    assert_heads_are_as_alone(runner_of(CAUSAL), qkv, (), plan_with(met), ours)


def test_lists_biases_and_sinks_go_with_any_precision() -> None:
    qkv, operands = random_qkv(200, 300), (torch.randn(HEADS),)
    met = random_blocks((BATCH, HEADS), 200, 300)
    plan = plan_with(met, key_bias=torch.randn(1, HEADS, 300))
    modes = int32([0, 1, 2, 3], [3, 3, 0, 2])
    # As a part of something larger, with strides of its own.
    room = torch.full((BATCH, 3, 2 * HEADS), -1, dtype=torch.int32)
    room[:, 1, ::2] = modes
    assert_heads_are_as_alone(runner_of(SINK), qkv, operands, plan, room[:, 1, ::2])


@pytest.mark.parametrize("mixed", [True, False])
def test_modes_of_nothing_are_as_none(mixed: bool) -> None:
    qkv, plan = random_qkv(130, 300), plan_with(every_block(130, 300))
    runner = runner_of(CAUSAL, mixed=mixed)
    ours = runner(*qkv, (), (), plan=dataclasses.replace(plan, modes=int32([0] * HEADS)))
    assert torch.equal(ours, runner(*qkv, (), (), plan=plan))


def test_head_in_float32_is_as_accurate_beside_others() -> None:
    qkv, plan = random_qkv(130, 300), plan_with(every_block(130, 300), modes=int32([3, 0, 3, 0]))
    ours = runner_of(PLAIN)(*qkv, (), (), plan=plan)[:, 1::2]
    eager = reference_attention(*qkv, (), (), PLAIN)[:, 1::2]
    exact = reference_attention(*(t.double() for t in qkv), (), (), PLAIN)[:, 1::2]
    assert_as_accurate(ours, eager, exact)


# -- skipping --------------------------------------------------------------------------------------


def skipping(
    qkv: Tensors,
    operands: tuple[torch.Tensor, ...],
    spec: AttentionSpec,
    met: torch.Tensor,
    skip: torch.Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the oracle makes of it."""
    wide = [tensor.to(dtype) for tensor in (*qkv, *operands)]
    thresholds = skip.expand(qkv[0].shape[:2])
    return skipping_attention(wide[:3], wide[3:], (), spec, met, thresholds, BLOCK, STEP_BLOCKS)


def counts(of: torch.Tensor) -> torch.Tensor:
    """How often rows of each head skip a block."""
    return of.sum((2, 3))


@pytest.mark.parametrize("name", ["PLAIN", "CAUSAL", "WINDOW", "SINK"])
@pytest.mark.parametrize("lead", LEADS)
def test_blocks_far_below_the_maximum_are_left_out(name: str, lead: tuple[int, int]) -> None:
    spec: AttentionSpec = globals()[name]
    for seed, (rows, columns) in enumerate([(200, 700), (64, 64), (65, 1000), (300, 130)]):
        qkv = whole_qkv(rows, columns, seed=seed)
        operands = tuple(torch.randint(-9, 9, (HEADS,)).float() for _ in spec.operands)
        met = random_blocks(lead, rows, columns, seed)
        if spec.empty_row is EmptyRow.IMPOSSIBLE:
            met[..., 0] = True
        # Some of them just what two whole scores can lie apart.
        skip = torch.tensor([3.0, 8.0, 17.1, 40.25, math.inf])[torch.randint(0, 5, lead)]
        found = torch.full((BATCH, HEADS), -1)
        plan = plan_with(met, skip=skip)
        ours = runner_of(spec)(*qkv, operands, (), plan=plan, skipped=found)
        exact, skipped = skipping(qkv, operands, spec, met, skip)
        assert torch.equal(found, counts(skipped))
        assert_as_accurate(ours, skipping(qkv, operands, spec, met, skip, FLOAT)[0], exact)


def test_something_is_skipped_where_scores_are_peaked() -> None:
    """Otherwise the test above would say nothing."""
    qkv, met = whole_qkv(200, 700), every_block(200, 700)
    _, skipped = skipping(qkv, (), PLAIN, met, torch.tensor([[8.0]]))
    assert 0.1 < skipped.double().mean() < 0.9
    assert not torch.equal(skipped[:, :, :64].any(2), skipped[:, :, :64].all(2))


@pytest.mark.parametrize("mode", range(BOTH + 1))
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def test_skipping_goes_with_any_precision(mode: int, dtype: torch.dtype) -> None:
    qkv, met = whole_qkv(130, 600), every_block(130, 600)
    skip = torch.tensor([[2.0, 8.0, 20.0, math.inf]])
    modes = int32([mode, mode, 0, mode]) if dtype == FLOAT else None
    given = tuple(tensor.to(dtype) for tensor in qkv)
    found = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    runner = runner_of(CAUSAL, dtype=dtype)
    ours = runner(*given, (), (), plan=plan_with(met, skip=skip, modes=modes), skipped=found)
    exact, skipped = skipping(qkv, (), CAUSAL, met, skip)
    assert torch.equal(found, counts(skipped))
    assert found[:, :2].all()
    eager, _ = skipping(qkv, (), CAUSAL, met, skip, BRAIN)
    assert_as_accurate(ours.to(BRAIN), eager, exact)


def test_bias_of_a_key_counts_in_what_is_skipped() -> None:
    qkv, met, skip = whole_qkv(130, 600), every_block(130, 600), torch.tensor([[8.0]])
    bias = torch.randint(-8, 9, (1, HEADS, 600)).float()
    bias[:, 1, 100:] = -math.inf
    found = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    plan = plan_with(met, skip=skip, key_bias=bias)
    ours = runner_of(PLAIN)(*qkv, (), (), plan=plan, skipped=found)
    operands = (bias.expand(BATCH, HEADS, 600),)
    exact, skipped = skipping(qkv, operands, BIASED, met, skip)
    assert torch.equal(found, counts(skipped))
    assert_as_accurate(ours, skipping(qkv, operands, BIASED, met, skip, FLOAT)[0], exact)


def ones(rows: int, columns: int) -> Tensors:
    """Queries of 1, keys of 0, values of 1: a key that is made of whole numbers is its score."""
    shapes = (HEADS, rows), (HEADS // GROUP, columns), (HEADS // GROUP, columns)
    q_BHMD, k_BGND, v_BGNE = (torch.zeros(BATCH, *shape, 16) for shape in shapes)
    q_BHMD[..., 0] = 4
    return q_BHMD, k_BGND, v_BGNE + 1


@pytest.mark.parametrize(
    ("skip", "skipped"), [(8.0, 0), (7.999999, 10), (math.inf, 0), (100.0, 0), (1e-6, 10)]
)
def test_skipped_is_what_lies_by_more_below(skip: float, skipped: int) -> None:
    qkv = ones(10, 300)
    qkv[1][:, :, 70, 0] = 8  # in the second block; scores of the last are 8 below
    qkv[1][:, :, 256:, 0] = 0
    qkv[1][:, :, :64, 0] = qkv[1][:, :, 128:256, 0] = 8
    found = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    plan = plan_with(every_block(10, 300), skip=torch.tensor([[skip]]))
    runner_of(PLAIN)(*qkv, (), (), plan=plan, skipped=found)
    assert torch.equal(found, torch.full_like(found, skipped))


def test_blocks_are_taken_in_the_order_of_their_list() -> None:
    # Only the last of nine blocks holds a large score: first in the list it lets the others go.
    qkv, met = ones(10, 576), every_block(10, 576)
    qkv[1][:, :, 570, 0] = 20
    ascending = plan_with(met, skip=torch.tensor([[8.0]]))
    descending = dataclasses.replace(ascending, blocks=ascending.blocks.flip(0))
    found = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    for plan, blocks in ((ascending, 0), (descending, 8)):
        runner_of(PLAIN)(*qkv, (), (), plan=plan, skipped=found)
        assert torch.equal(found, torch.full_like(found, 10 * blocks))


def test_a_row_that_has_no_key_skips_nothing() -> None:
    spec = dataclasses.replace(PLAIN, mask=sympy.Ge(q, 3), empty_row=EmptyRow.ZERO)
    qkv = ones(12, 256)
    qkv[1][:, :, 5, 0] = 20
    found = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    plan = plan_with(every_block(12, 256), skip=torch.tensor([[8.0]]))
    ours = runner_of(spec)(*qkv, (), (), plan=plan, skipped=found)
    assert torch.equal(found, torch.full_like(found, 9 * 3))  # rows with keys, three blocks
    assert not ours[:, :, :3].any()
    assert torch.allclose(ours[:, :, 3:], torch.ones(()))


@pytest.mark.parametrize("mode", [0, BOTH])
def test_skip_of_infinity_changes_nothing(mode: int) -> None:
    qkv, plan = whole_qkv(200, 500), plan_with(every_block(200, 500), modes=int32([mode]))
    never = dataclasses.replace(plan, skip=torch.tensor([[math.inf]]))
    runner = runner_of(WINDOW)
    found = torch.ones(BATCH, HEADS, dtype=torch.int64)
    ours = runner(*qkv, (), (), plan=never, skipped=found)
    assert torch.equal(ours, runner(*qkv, (), (), plan=plan))
    assert not found.any()


def test_few_rows_are_exact_whatever_the_plan_says() -> None:
    qkv, plan = whole_qkv(8, 500), plan_with(every_block(8, 500))
    found = torch.ones(BATCH, HEADS, dtype=torch.int64)
    hasty = dataclasses.replace(plan, modes=int32([BOTH]), skip=torch.tensor([[1.0]]))
    runner = runner_of(CAUSAL)
    ours = runner(*qkv, (), (), plan=hasty, skipped=found)
    assert torch.equal(ours, runner(*qkv, (), (), plan=plan))
    assert not found.any()


@pytest.fixture
def _threads() -> Iterator[None]:
    """Their number is as it was afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_result_is_the_same_for_any_number_of_threads() -> None:
    qkv, met = whole_qkv(300, 500), every_block(300, 500)
    plan = plan_with(met, modes=int32([0, 1, 2, 3]), skip=torch.tensor([[8.0, 1.0, 9.0, 20.0]]))
    results = []
    for threads in (1, 2, 3, 50):
        torch.set_num_threads(threads)
        found = torch.zeros(BATCH, HEADS, dtype=torch.int64)
        ours = runner_of(CAUSAL)(*qkv, (), (), plan=plan, skipped=found)
        results.append((ours, found))
    assert all(torch.equal(ours, results[0][0]) for ours, _ in results)
    assert all(torch.equal(found, results[0][1]) for _, found in results)


# -- what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", [3, 100, 140, 299])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F812345])
def test_nan_in_a_score_is_not_skipped(place: int, bits: int) -> None:
    # The first key outweighs all others: only because of NaN does a row look at them.
    qkv, met, skip = ones(70, 300), every_block(70, 300), torch.tensor([[8.0]])
    qkv[1][:, :, 0, 0] = 20
    bias = torch.zeros(BATCH, HEADS, 300)
    bias.view(torch.int32)[1, 2, place] = bits
    plan = plan_with(met, skip=skip)
    found = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    ours = runner_of(BIASED)(*qkv, (bias,), (), plan=plan, skipped=found)
    assert ours.isnan().all(-1).all(-1).nonzero().tolist() == [[1, 2]]
    assert ours[0].isfinite().all()
    assert found[0].tolist() == [70 * 4] * HEADS


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_computed_exactly(value: float) -> None:
    qkv, met = whole_qkv(130, 300), random_blocks((1, HEADS), 130, 300)
    met[..., 0] = True
    qkv[0][1, 1, 100, 5] = value
    found = torch.ones(BATCH, HEADS, dtype=torch.int64)
    hasty = plan_with(met, modes=int32([BOTH]), skip=torch.tensor([[1.0]]))
    ours = runner_of(PLAIN)(*qkv, (), (), plan=hasty, skipped=found)
    exact = runner_of(PLAIN)(*qkv, (), (), plan=plan_with(met))
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.nan_to_num(), exact.nan_to_num())
    assert ours[1, 1, 100].isnan().all()
    assert not found.any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_only_bfloat16_is_too_small_for_is_computed_exactly(which: int) -> None:
    # The largest float rounds to infinity in bfloat16; its score, and its weight, are small.
    qkv, met = random_qkv(130, 300), every_block(130, 300)
    qkv[which][0, 0, 40, 3] = torch.finfo(torch.float32).max
    if which < 2:
        qkv[1 - which][..., 3] *= 1e-38
    plan = plan_with(met, modes=int32([BOTH]))
    ours, exact = (runner_of(PLAIN)(*qkv, (), (), plan=p) for p in (plan, plan_with(met)))
    assert exact.isfinite().all()
    oracle = reference_attention(*(t.double() for t in qkv), [], (), PLAIN)
    assert_as_accurate(ours, exact, oracle)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_overflow_are_as_without_skipping(sign: int) -> None:
    qkv, met = random_qkv(70, 300), every_block(70, 300)
    qkv[0].copy_(qkv[0].abs()).mul_(1e10)
    qkv[1].mul_(1e-10)[:, :, 200] = sign * 1e30
    plan = plan_with(met)
    hasty = dataclasses.replace(plan, skip=torch.tensor([[30.0]]))
    ours, all_keys = (runner_of(PLAIN)(*qkv, (), (), plan=p) for p in (hasty, plan))
    assert torch.equal(ours.isnan(), all_keys.isnan())
    assert ours.isnan().any() == (sign > 0)


# -- how much skipping may change ------------------------------------------------------------------


def test_thousand_heads_stay_within_the_bound() -> None:
    """n keys left out weigh at most n exp(-skip) relative to those kept: |out - exact| is at most
    twice that share times the largest |V|, and rounding."""
    skipping_heads = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        rows = int(torch.randint(9, 150, (), generator=generator))
        columns = int(torch.randint(65, 400, (), generator=generator))
        q_BHMD, k_BGND, v_BGNE = random_qkv(rows, columns, batch=5, seed=seed)
        peaked = 12 * torch.rand(5, HEADS, 1, 1, generator=generator)
        peaked = peaked * torch.rand(5, HEADS, rows, 1, generator=generator)
        # Keys that attract all queries, which all others lie far below.
        q_BHMD[..., 0], k_BGND[..., :3, 0] = q_BHMD[..., 0].abs() + 4, 3
        qkv = q_BHMD * peaked, k_BGND, v_BGNE
        skip = 0.5 + 12 * torch.rand(5, HEADS, generator=generator)
        found = torch.zeros(5, HEADS, dtype=torch.int64)
        met = every_block(rows, columns)
        ours = runner_of(PLAIN)(*qkv, (), (), plan=plan_with(met, skip=skip), skipped=found)
        exact = reference_attention(*(t.double() for t in qkv), (), (), PLAIN)
        eager = reference_attention(*qkv, (), (), PLAIN)
        # A score may be rounded across the threshold.
        _, skipped = skipping(qkv, (), PLAIN, met, skip - 1e-3)
        assert (found <= counts(skipped)).all()
        skipping_heads += int((found > 0).sum())
        sizes = torch.full((met.shape[-1],), 64.0, dtype=torch.float64)
        sizes[-1] -= 64 * len(sizes) - columns
        share = (skipped * sizes).sum(-1, keepdim=True) * (-skip.double()).exp()[..., None, None]
        largest = v_BGNE.double().abs().amax((2, 3)).repeat_interleave(GROUP, 1)[..., None, None]
        rounding = 2 * (eager.double() - exact).abs().max() + 4 * torch.finfo(FLOAT).eps
        assert ((ours.double() - exact).abs() <= 2 * share * largest + rounding).all()
    assert skipping_heads > 300


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": int32([0]).long()}, r"modes torch.int64 \(1, 1\): int32 \[B\|1, H\|1\]"),
        ({"modes": int32(0)}, r"modes torch.int32 \(1,\)"),
        ({"modes": int32([0] * GROUP)}, r"modes torch.int32 \(1, 2\)"),
        ({"modes": int32([0], [0], [0])}, r"modes torch.int32 \(3, 1\)"),
        ({"modes": int32([0])[None]}, r"modes torch.int32 \(1, 1, 1\)"),
        ({"modes": int32([])}, r"modes torch.int32 \(1, 0\)"),
        ({"modes": int32([0, 4, 0, 0])}, "modes from 0 to 4: 0 to 3"),
        ({"modes": int32([0, -1, 0, 0])}, "modes from -1 to 0: 0 to 3"),
        (
            {"skip": torch.ones(1, 1).double()},
            r"skip torch.float64 \(1, 1\): float32 \[B\|1, H\|1\]",
        ),
        ({"skip": torch.ones(HEADS)}, r"skip torch.float32 \(4,\)"),
        ({"skip": torch.ones(1, GROUP)}, r"skip torch.float32 \(1, 2\)"),
        ({"skip": torch.ones(3, 1)}, r"skip torch.float32 \(3, 1\)"),
        ({"skip": torch.tensor([[1.0, 0.0, 1.0, 1.0]])}, "above 0"),
        ({"skip": torch.tensor([[1.0, -1.0, 1.0, 1.0]])}, "above 0"),
        ({"skip": torch.tensor([[1.0, math.nan, 1.0, 1.0]])}, "above 0"),
    ],
)
def test_plan_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = plan_with(every_block(20, 70), **changes)
    with pytest.raises(ValueError, match=message):
        runner_of(PLAIN)(*random_qkv(20, 70), (), (), plan=plan)


@pytest.mark.parametrize(
    "skipped",
    [
        torch.zeros(BATCH, HEADS, dtype=torch.int32),
        torch.zeros(1, HEADS, dtype=torch.int64),
        torch.zeros(BATCH, 2 * HEADS, dtype=torch.int64)[:, ::2],
    ],
)
def test_counts_that_do_not_fit_are_refused(skipped: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"contiguous int64 \(2, 4\)"):
        runner_of(PLAIN)(*random_qkv(20, 70), (), (), skipped=skipped)
