"""The generated C++ kernel, forward: sizes, layouts, values, plans and threads, against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import hypothesis
import masks
import pytest
import sympy
import torch
from check import assert_as_accurate
from hypothesis import strategies as st

from adaattn_compiler.kernels import ops
from adaattn_compiler.kernels.cpu import library
from adaattn_compiler.kernels.cpu.call import Plan
from adaattn_compiler.kernels.cpu.runner import CppRunner, cpp_runner, plan_of
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Load,
    M,
    N,
    OperandSpec,
    S,
    Where,
    b,
    h,
    k,
    q,
)

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
FLOAT1 = OperandSpec("float", 1)
BATCH, HEADS, GROUP = 2, 4, 2
BLOCK = 64

# The last rows of a sequence, each with a window of keys; those before its first key have none.
AT = q + N - M
LAST = AttentionSpec(
    0.25,
    mask=sympy.And(sympy.Ge(AT - k, 0), sympy.Ge(k - AT + 99, 0)),
    empty_row=EmptyRow.ZERO,
    group=GROUP,
)
PLAIN = AttentionSpec(0.25, group=GROUP)
SINK = dataclasses.replace(LAST, sink=Load(0, h), operands=(FLOAT1,))

OP = ops.attention


@dataclass(frozen=True)
class Inputs:
    """What a call is given."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    operands: tuple[torch.Tensor, ...] = ()

    def exact(self, spec: AttentionSpec, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """What the oracle makes of them in another precision."""
        q_BHMD, k_BGND, v_BGNE = (tensor.to(dtype) for tensor in (self.q, self.k, self.v))
        operands = [o.to(dtype) if o.is_floating_point() else o for o in self.operands]
        return reference_attention(q_BHMD, k_BGND, v_BGNE, operands, (), spec)

    def through(self, runner: CppRunner, **further: Any) -> torch.Tensor:
        """What a runner makes of them."""
        return runner(self.q, self.k, self.v, self.operands, (), **further)


def text_of(
    spec: AttentionSpec,
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = FLOAT,
    mixed: bool = False,
) -> str:
    """The plan of a kernel, as the op takes it."""
    shape = Shape(None, HEADS, HEADS // spec.group, None, None, *dims)
    return plan_of(Problem(spec, shape, dtype, "cpu", False), mixed)


def runner_of(
    spec: AttentionSpec,
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = FLOAT,
    mixed: bool = False,
) -> CppRunner:
    return cpp_runner(text_of(spec, dims, dtype, mixed))


def random_inputs(
    rows: int,
    columns: int,
    spec: AttentionSpec = LAST,
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = FLOAT,
    batch: int = BATCH,
    seed: int = 0,
) -> Inputs:
    """q, k and v as projections lay them out, and an operand [H] where the spec has one."""
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, length: int, dim: int) -> torch.Tensor:
        data = torch.randn(batch, length, heads, dim, generator=generator)
        return data.transpose(1, 2).to(dtype)

    kv_heads = HEADS // spec.group
    qkv = random(HEADS, rows, dims[0]), random(kv_heads, columns, dims[0])
    operands = tuple(torch.randn(HEADS, generator=generator) for _ in spec.operands)
    return Inputs(*qkv, random(kv_heads, columns, dims[1]), operands)


def assert_right(ours: torch.Tensor, inputs: Inputs, spec: AttentionSpec) -> None:
    assert_as_accurate(ours, inputs.exact(spec, inputs.q.dtype), inputs.exact(spec))


# -- sizes and layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype"),
    [
        (7, 33, FLOAT),
        (8, 8, FLOAT),
        (24, 40, FLOAT),
        (64, 64, FLOAT),
        (256, 256, FLOAT),
        (33, 7, BRAIN),
        (40, 72, BRAIN),
        (128, 128, BRAIN),
        (80, 72, HALF),
    ],
)
def test_any_head_dimensions_and_lengths_are_right(
    head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    dims = head_dim, value_dim
    runner = runner_of(LAST, dims, dtype)
    many = [(63, 65), (64, 64), (65, 130), (130, 300), (300, 1)]
    few = [(1, 1), (1, 64), (2, 63), (1, 700), (8, 300), (8, 2)]  # which are computed otherwise
    for rows, columns in many + few:
        inputs = random_inputs(rows, columns, LAST, dims, dtype)
        assert_right(inputs.through(runner), inputs, LAST)


def _strided(like: torch.Tensor) -> torch.Tensor:
    return like.repeat_interleave(3, -1)[..., 1::3]


def _expanded(like: torch.Tensor) -> torch.Tensor:
    return like[:1, :1].expand(like.shape)


def _one_row(like: torch.Tensor) -> torch.Tensor:
    return like[:, :, :1].expand(like.shape)


def _one_column(like: torch.Tensor) -> torch.Tensor:
    return like[..., :1].expand(like.shape)


def _transposed(like: torch.Tensor) -> torch.Tensor:
    return like.transpose(-1, -2).contiguous().transpose(-1, -2)


def _overlapping(like: torch.Tensor) -> torch.Tensor:
    batch, heads, length, dim = like.shape
    steps = (7, 5, 3, 1)
    size = sum((n - 1) * step for n, step in zip(like.shape, steps, strict=True)) + 1
    return torch.randn(size).to(like.dtype).as_strided((batch, heads, length, dim), steps)


def _off_its_alignment(like: torch.Tensor) -> torch.Tensor:
    return torch.cat([like.new_zeros(1), like.flatten()])[1:].view(like.shape)


@pytest.mark.parametrize(
    "layout",
    [
        _strided,
        _expanded,
        _one_row,
        _one_column,
        _transposed,
        _overlapping,
        _off_its_alignment,
        torch.Tensor.contiguous,
    ],
)
def test_any_layout_is_read_as_it_is(layout: Any) -> None:
    runner = runner_of(LAST)
    for inputs in (random_inputs(70, 130), random_inputs(3, 130)):
        for name in "qkv":
            odd = dataclasses.replace(inputs, **{name: layout(getattr(inputs, name))})
            assert_right(odd.through(runner), odd, LAST)


def test_q_k_and_v_may_be_one_tensor() -> None:
    spec = dataclasses.replace(LAST, group=1)
    x = torch.randn(BATCH, HEADS, 130, 16)
    inputs = Inputs(x, x, x)
    ours = inputs.through(runner_of(spec, (16, 16)))
    assert_right(ours, inputs, spec)
    assert ours.stride() == (130 * HEADS * 16, 16, HEADS * 16, 1)


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)])
def test_op_takes_empty_tensors(sizes: tuple[int, int, int]) -> None:
    batch, rows, columns = sizes
    inputs = random_inputs(rows, columns, batch=batch)
    ours = torch.ops.adaattn.attention(inputs.q, inputs.k, inputs.v, [], [], text_of(LAST))
    assert torch.equal(ours, inputs.exact(LAST, FLOAT))


def test_tensors_that_it_was_not_made_for_are_refused() -> None:
    runner = runner_of(SINK)
    inputs = random_inputs(5, 5, SINK)
    wrong: list[dict[str, Any]] = [
        {"q": inputs.q.double()},
        {"v": inputs.v.to(BRAIN)},
        {"q": inputs.q[..., :8]},
        {"k": inputs.k[:, :1]},
        {"v": inputs.v[:, :, 1:]},
        {"q": inputs.q[:1]},
    ]
    for changes in wrong:
        with pytest.raises(ValueError, match="the kernel was made for"):
            dataclasses.replace(inputs, **changes).through(runner)
    with pytest.raises(ValueError, match="0 operands instead of 1"):
        dataclasses.replace(inputs, operands=()).through(runner)
    with pytest.raises(ValueError, match="an operand of 2 axes instead of 1"):
        dataclasses.replace(inputs, operands=(inputs.operands[0][None],)).through(runner)


# -- what a mask leaves out ------------------------------------------------------------------------

# Strips of rows with no key, one key, keys with gaps between, and keys at either end of a block.
GAPS = {
    "strips of no keys": sympy.Ge(sympy.Mod(q, 13) - 6, 0),
    "one key": sympy.Eq(sympy.Mod(q, 64), k),
    "every eleventh key": sympy.Eq(sympy.Mod(k - q, 11), 0),
    "either end": sympy.Or(sympy.Eq(sympy.Mod(k, 64), 0), sympy.Eq(sympy.Mod(k, 64), 63)),
    "odd ends": sympy.And(sympy.Ge(k - 17, 0), sympy.Ge(46 - k, 0)),
    "causal": sympy.Ge(q - k, 0),
    "causal from the end": sympy.Ge(k - q, 0),
    "another for each head": sympy.Eq(sympy.Mod(k - 29 * h, 128), q),
}


@pytest.mark.parametrize("name", GAPS)
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def test_masks_of_any_form_within_a_block_are_kept(name: str, dtype: torch.dtype) -> None:
    spec = AttentionSpec(0.25, mask=GAPS[name], empty_row=EmptyRow.ZERO, group=GROUP)
    runner = runner_of(spec, (32, 16), dtype)
    for rows, columns in [(64, 64), (70, 130), (131, 129), (1, 700), (5, 300)]:
        inputs = random_inputs(rows, columns, spec, (32, 16), dtype)
        assert_right(inputs.through(runner), inputs, spec)


def test_overflow_under_a_mask_is_masked() -> None:
    spec = AttentionSpec(0.25, mask=sympy.Ge(q - k, 0), group=GROUP)
    inputs = random_inputs(70, 130, spec)
    inputs.q.copy_(inputs.q.abs()).mul_(1e10)
    inputs.k.mul_(1e-10)[:, :, 100:] = 1e30
    ours = inputs.through(runner_of(spec))
    assert ours.isfinite().all()
    assert_right(ours, inputs, spec)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(("rows", "columns"), [(70, 300), (4, 300)])
def test_what_is_not_finite_reaches_the_rows_that_it_belongs_in(
    name: str, value: float, rows: int, columns: int
) -> None:
    # At keys that no row attends to, some do, and most do.
    for place in (3, 190, 297):
        inputs = random_inputs(rows, columns)
        tensor = getattr(inputs, name)
        whole = inputs.through(runner_of(LAST))
        tensor[1, 1, place % tensor.shape[2], 5] = value
        ours = inputs.through(runner_of(LAST))
        if rows == 4 and name == "v" and place != 297:
            # Few rows do not read the keys that none of them attends to.
            assert torch.equal(ours, whole)
            continue
        assert_right(ours, inputs, LAST)
        assert torch.equal(ours.isinf(), inputs.exact(LAST).isinf())


def test_denormal_numbers_are_computed_with() -> None:
    inputs = random_inputs(70, 130)
    small = 2.0**-149
    inputs.q.mul_(1e-40)
    inputs.v.mul_(100 * small)
    ours, exact = inputs.through(runner_of(LAST)), inputs.exact(LAST)
    yardstick = (inputs.exact(LAST, FLOAT).double() - exact).abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * yardstick + small
    assert ours.any()


@pytest.mark.parametrize("spec", [LAST, PLAIN])
def test_scores_may_be_large(spec: AttentionSpec) -> None:
    # Whole numbers, so that what is measured is the softmax: products of about 1e4 are exact.
    generator = torch.Generator().manual_seed(0)
    inputs = random_inputs(130, 300, spec)
    for tensor in (inputs.q, inputs.k):
        tensor.copy_(torch.randint(-64, 65, tensor.shape, generator=generator).float())
    assert inputs.exact(AttentionSpec(0.25, group=GROUP)).isfinite().all()
    assert_right(inputs.through(runner_of(spec)), inputs, spec)


@pytest.mark.parametrize("spec", [LAST, PLAIN])
@pytest.mark.parametrize("rows", [70, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_overflow_are_infinite(spec: AttentionSpec, rows: int, sign: int) -> None:
    inputs = random_inputs(rows, 70, spec)
    inputs.q.copy_(inputs.q.abs()).mul_(1e10)
    inputs.k.mul_(1e-10)[:, :, 5] = sign * 1e30
    ours, eager = inputs.through(runner_of(spec)), inputs.exact(spec, FLOAT)
    assert eager.isnan().any() == (sign > 0)
    assert torch.equal(ours.isnan(), eager.isnan())


@pytest.mark.parametrize("rows", [70, 3])
def test_scores_may_be_so_large_that_only_the_largest_counts(rows: int) -> None:
    # Beside 1e10 one is nothing; the scale is one by which products are not exact.
    spec = AttentionSpec(0.3, group=GROUP)
    inputs = random_inputs(rows, 70, spec)
    inputs.q.mul_(1e10)
    assert_right(inputs.through(runner_of(spec)), inputs, spec)


@pytest.mark.parametrize("rows", [90, 3])
@pytest.mark.parametrize("place", [0, 1, 66])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F812345])
def test_nan_in_a_bias_reaches_the_rows_that_attend_to_it(rows: int, place: int, bits: int) -> None:
    # With any payload, and also where it is all that a row attends to.
    spec = AttentionSpec(
        0.25, S + Load(0, k), sympy.Ge(q - k, 0), EmptyRow.ZERO, operands=(FLOAT1,), group=GROUP
    )
    bias = torch.zeros(90)
    bias.view(torch.int32)[place] = bits
    inputs = random_inputs(rows, 90, PLAIN, (16, 16))
    inputs = dataclasses.replace(inputs, operands=(bias,))
    ours = inputs.through(runner_of(spec, (16, 16)))
    assert ours.isnan().any(-1)[0, 0].tolist() == [row >= place for row in range(rows)]
    assert_right(ours, inputs, spec)


@pytest.mark.parametrize("extreme", [sympy.Max, sympy.Min])
def test_nan_comes_through_the_larger_and_the_smaller_of_two(extreme: Any) -> None:
    spec = AttentionSpec(0.25, extreme(S, Load(0, k)), operands=(FLOAT1,), group=GROUP)
    inputs = random_inputs(20, 70, PLAIN, (16, 16))
    for place in (3, 66):
        bias = torch.zeros(70)
        bias[place] = math.nan
        given = dataclasses.replace(inputs, operands=(bias,))
        ours = given.through(runner_of(spec, (16, 16)))
        assert ours.isnan().all()
        assert_right(ours, given, spec)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sink_that_is_not_finite_is_as_the_oracle_has_it(value: float) -> None:
    inputs = random_inputs(90, 70, SINK)
    inputs.operands[0][1] = value
    assert_right(inputs.through(runner_of(SINK)), inputs, SINK)


@pytest.mark.parametrize("empty_row", [EmptyRow.ZERO, EmptyRow.NAN, EmptyRow.UNIFORM])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def test_rows_without_keys_are_what_the_spec_says(empty_row: EmptyRow, dtype: torch.dtype) -> None:
    # Some by the predicate (a block of them and more), and a batch item by its data.
    spec = AttentionSpec(
        0.25,
        mask=sympy.And(sympy.Ge(q - k - 70, 0), sympy.Ne(Load(0, b, k), 0)),
        empty_row=empty_row,
        operands=(OperandSpec("bool", 2),),
        group=GROUP,
    )
    inputs = random_inputs(150, 90, AttentionSpec(0.25, group=GROUP), (8, 8), dtype)
    keep = torch.rand(BATCH, 90) > 0.5
    keep[1] = False
    inputs = dataclasses.replace(inputs, operands=(keep,))
    ours = inputs.through(runner_of(spec, (8, 8), dtype))
    assert_right(ours, inputs, spec)
    assert ours[:, :, :70].isnan().all() == (empty_row is EmptyRow.NAN)


@pytest.mark.parametrize("spec", [LAST, SINK])
@pytest.mark.parametrize(("rows", "columns"), [(150, 130), (8, 300), (8, 5)])
def test_log_sum_exp_is_that_of_the_scores_and_the_sink(
    spec: AttentionSpec, rows: int, columns: int
) -> None:
    def sums(dtype: torch.dtype) -> torch.Tensor:
        wide = inputs.q.to(dtype), inputs.k.repeat_interleave(GROUP, 1).to(dtype)
        scores = wide[0] @ wide[1].mT * 0.25
        ahead = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
        scores = scores.masked_fill((ahead > 0) | (ahead < -99), -math.inf)
        if inputs.operands:
            sink = inputs.operands[0].to(dtype).reshape(-1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        return scores.logsumexp(-1)

    inputs = random_inputs(rows, columns, spec)
    ours = torch.full((BATCH, HEADS, rows), math.nan)
    out = inputs.through(runner_of(spec), lse=ours)
    assert_right(out, inputs, spec)
    exact = sums(torch.float64)
    assert torch.equal(ours.isinf(), exact.isinf())
    assert exact.isinf().any() == (spec is LAST and rows > columns)
    assert_as_accurate(ours, sums(FLOAT), exact)


# -- threads ---------------------------------------------------------------------------------------


@pytest.fixture
def _threads() -> Iterator[None]:
    """Their number is as it was afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_result_is_the_same_for_any_number_of_threads() -> None:
    runner, inputs = runner_of(LAST), random_inputs(300, 300)
    results = []
    for threads in (1, 2, 3, 50):
        torch.set_num_threads(threads)
        results.append(inputs.through(runner))
    assert_right(results[0], inputs, LAST)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("spec", [PLAIN, SINK])
def test_keys_of_few_rows_are_split_among_any_number_of_threads(spec: AttentionSpec) -> None:
    inputs = random_inputs(3, 2000, spec)
    for threads in (1, 2, 3, 50):
        torch.set_num_threads(threads)
        assert_right(inputs.through(runner_of(spec)), inputs, spec)


def test_threads_may_call_it_at_once() -> None:
    runner = runner_of(LAST)
    lengths = [(3 + 37 * i, 600 - 89 * i) for i in range(6)]
    each = [random_inputs(*sizes, seed=i) for i, sizes in enumerate(lengths)]
    alone = [inputs.through(runner) for inputs in each]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda inputs: inputs.through(runner), each)
            assert all(map(torch.equal, together, alone))


# -- plans -----------------------------------------------------------------------------------------

ROWS, FEW, COLUMNS = 200, 5, 300
ROW_BLOCKS, KEY_BLOCKS = 4, 5


def lists_of(keep: torch.Tensor, *, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, blocks) of the blocks that are kept, bool [B|1, H|1, row blocks, key blocks]."""
    ends = keep.sum(-1).flatten().cumsum(0).reshape(keep.shape[:3])
    starts = ends - keep.sum(-1)
    offsets = torch.cat([starts, ends[..., -1:]], -1).to(torch.int32)
    blocks = 2 * keep.nonzero()[:, -1] + int(masked)
    return offsets, blocks.to(torch.int32)


def planned(
    spec: AttentionSpec, inputs: Inputs, keep: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[AttentionSpec, Inputs]:
    """What a plan computes, said without one: its blocks as a mask, its biases in the score."""
    dense = keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    rows = inputs.q.shape[2]
    dense = dense[:, :, :rows, :COLUMNS].expand(BATCH, HEADS, rows, COLUMNS)
    whole = dataclasses.replace(
        spec,
        mask=sympy.And(spec.mask, sympy.Ne(Load(0, b, h, q, k), 0)),
        operands=(OperandSpec("bool", 4),),
    )
    operands = [dense]
    if bias is not None:
        whole = dataclasses.replace(
            whole,
            score=whole.score + Load(1, b, h, k),
            operands=(*whole.operands, OperandSpec("float", 3)),
        )
        operands.append(bias.expand(BATCH, HEADS, COLUMNS))
    return whole, dataclasses.replace(inputs, operands=tuple(operands))


def random_blocks(batch: int, heads: int, rows: int = ROWS) -> torch.Tensor:
    keep = torch.rand(batch, heads, -(-rows // BLOCK), KEY_BLOCKS) > 0.5
    keep[0, 0, 0] = False  # rows without a key
    return keep


@pytest.mark.parametrize("spec", [PLAIN, LAST])
@pytest.mark.parametrize("lead", [(1, 1), (1, HEADS), (BATCH, 1), (BATCH, HEADS)])
@pytest.mark.parametrize("rows", [ROWS, FEW])
def test_plan_of_fewer_blocks_attends_to_them_only(
    spec: AttentionSpec, lead: tuple[int, int], rows: int
) -> None:
    inputs, keep = random_inputs(rows, COLUMNS), random_blocks(*lead, rows)
    offsets, blocks = lists_of(keep, masked=spec is LAST)
    # As a part of something larger, with strides of its own.
    room = torch.full((lead[0], 2 * lead[1], offsets.shape[2] + 3), -1, dtype=torch.int32)
    room[:, ::2, 2:-1] = offsets
    for lists in (offsets, room[:, ::2, 2:-1]):
        ours = inputs.through(runner_of(spec), plan=Plan(lists, blocks))
        whole, said = planned(spec, inputs, keep)
        assert_right(ours, said, whole)


@pytest.mark.parametrize("lead", [(1, 1), (1, HEADS), (BATCH, 1), (BATCH, HEADS)])
@pytest.mark.parametrize("rows", [ROWS, FEW])
def test_key_bias_is_added_to_the_scores(lead: tuple[int, int], rows: int) -> None:
    inputs, keep = random_inputs(rows, COLUMNS), random_blocks(1, 1, rows)
    keep[..., 0] = True
    bias = torch.randn(*lead, 2 * COLUMNS)[..., :COLUMNS]
    bias[..., 7] = -math.inf
    plan = Plan(*lists_of(keep, masked=False), key_bias=bias)
    whole, said = planned(PLAIN, inputs, keep, bias)
    assert_right(inputs.through(runner_of(PLAIN), plan=plan), said, whole)


@pytest.mark.parametrize("name", ["q", "k"])
def test_plan_holds_where_something_is_not_finite(name: str) -> None:
    inputs, keep = random_inputs(ROWS, COLUMNS), random_blocks(BATCH, HEADS)
    getattr(inputs, name)[1, 1, 100, 5] = math.nan
    bias = torch.randn(1, HEADS, COLUMNS)
    plan = Plan(*lists_of(keep, masked=False), key_bias=bias)
    whole, said = planned(PLAIN, inputs, keep, bias)
    assert_right(inputs.through(runner_of(PLAIN), plan=plan), said, whole)


@pytest.mark.parametrize(("scores", "values"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [ROWS, FEW])
def test_precision_of_a_stage_is_that_of_bfloat16_at_worst(
    scores: bool, values: bool, rows: int
) -> None:
    inputs, keep = random_inputs(rows, COLUMNS), random_blocks(1, 1, rows)
    offsets, blocks = lists_of(keep, masked=True)
    modes = torch.tensor([[scores + 2 * values]], dtype=torch.int32)
    ours = inputs.through(runner_of(LAST, mixed=True), plan=Plan(offsets, blocks, modes=modes))
    assert ours.dtype == FLOAT
    whole, said = planned(LAST, inputs, keep)
    exact = said.exact(whole)
    error = (ours.double() - exact).abs().max()
    assert error <= 2 * (said.exact(whole, BRAIN).double() - exact).abs().max()


def test_plans_and_lengths_change_without_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(PLAIN)
    monkeypatch.setattr(library, "_build", None)
    inputs = random_inputs(ROWS, COLUMNS)
    exact = inputs.through(runner)
    for seed in range(3):
        torch.manual_seed(seed)
        keep = random_blocks(1, HEADS)
        ours = inputs.through(runner, plan=Plan(*lists_of(keep, masked=False)))
        whole, said = planned(PLAIN, inputs, keep)
        assert_right(ours, said, whole)
        other = random_inputs(20 + seed, 30 - seed)
        assert_right(other.through(runner), other, PLAIN)
    assert torch.equal(inputs.through(runner), exact)


_OFFSETS, _BLOCKS = lists_of(
    torch.ones(1, 1, ROW_BLOCKS, KEY_BLOCKS, dtype=torch.bool), masked=False
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": _OFFSETS.long()}, "int32"),
        ({"offsets": _OFFSETS.repeat(BATCH + 1, 1, 1)}, r"\[B\|1, H\|1, blocks \+ 1\]"),
        ({"offsets": _OFFSETS.repeat(1, 2, 1)}, r"\[B\|1, H\|1, blocks \+ 1\]"),
        ({"offsets": _OFFSETS.repeat_interleave(2, -1)[..., ::2]}, "offsets"),
        ({"offsets": _OFFSETS[..., 1:]}, "4 offsets for 4 blocks of query rows"),
        ({"offsets": _OFFSETS.flip(-1)}, "ascend"),
        ({"offsets": _OFFSETS - 1}, "ascend"),
        ({"offsets": _OFFSETS + 1}, "within the 20 blocks"),
        ({"blocks": _BLOCKS[1:]}, "within the 19 blocks"),
        ({"blocks": _BLOCKS.long()}, "a contiguous int32 vector"),
        ({"blocks": _BLOCKS[None].repeat(20, 1)}, "a contiguous int32 vector"),
        ({"blocks": _BLOCKS.repeat_interleave(2)[::2]}, "a contiguous int32 vector"),
        ({"blocks": _BLOCKS + 2}, "must be below 10"),
        ({"blocks": _BLOCKS - 1}, "must be below 10"),
        ({"key_bias": torch.zeros(1, 1, COLUMNS).double()}, "key_bias"),
        ({"key_bias": torch.zeros(1, 1, COLUMNS - 1)}, "key_bias"),
        ({"key_bias": torch.zeros(3, 1, COLUMNS)}, "key_bias"),
        ({"key_bias": torch.zeros(1, GROUP, COLUMNS)}, "key_bias"),
        ({"key_bias": torch.zeros(1, 1, 2 * COLUMNS)[..., ::2]}, "last stride"),
        ({"modes": torch.tensor([[1]], dtype=torch.int32)}, "mixed precision"),
        ({"modes": torch.tensor([[2]], dtype=torch.int32)}, "mixed precision"),
    ],
)
def test_plan_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = dataclasses.replace(Plan(_OFFSETS, _BLOCKS), **changes)
    inputs = random_inputs(ROWS, COLUMNS)
    with pytest.raises(ValueError, match=message):
        inputs.through(runner_of(PLAIN), plan=plan)


# -- all of it at once -----------------------------------------------------------------------------

SLOPE, DISTANCE = Load(0, h), Load(1, h, k - q + M - 1)
SCORES = (
    S,
    4 * sympy.tanh(S / 4),
    S + (k - q) * SLOPE,
    S + DISTANCE,
    Where(sympy.Ge(q, k), S, sympy.Integer(-5)),
    sympy.Max(S, -1) * sympy.Abs(SLOPE) + sympy.Min(DISTANCE, 1),
)


@st.composite
def specs(draw: st.DrawFn) -> tuple[AttentionSpec, masks.Mask]:
    """A spec with two operands, and its mask with what that means."""
    mask = draw(masks.trees(masks.atoms))
    spec = AttentionSpec(
        draw(st.sampled_from([0.25, -0.5, 1.0])),
        draw(st.sampled_from(SCORES)),
        mask.predicate,
        EmptyRow.ZERO,
        draw(st.sampled_from([None, SLOPE, sympy.Integer(1)])),
        group=draw(st.sampled_from([1, 2, 4])),
        operands=(FLOAT1, OperandSpec("float", 2)),
    )
    return spec, mask


# No shrinking: each step of it would be a build.
@hypothesis.settings(max_examples=8, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
@hypothesis.given(
    specs(),
    st.sampled_from([(16, 16), (16, 8), (9, 16)]),
    st.sampled_from([FLOAT, FLOAT, BRAIN, HALF]),
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=4, max_size=4),
)
def test_anything_together_is_right(
    drawn: tuple[AttentionSpec, masks.Mask],
    dims: tuple[int, int],
    dtype: torch.dtype,
    lengths: Sequence[tuple[int, int]],
) -> None:
    spec, mask = drawn
    # The oracle is given the mask itself, made of what it means.
    dense = dataclasses.replace(
        spec,
        mask=sympy.Ne(Load(2, q, k), 0),
        operands=(*spec.operands, OperandSpec("bool", 2)),
    )
    for rows, columns in lengths:
        inputs = random_inputs(rows, columns, spec, dims, dtype, seed=rows)
        operands = torch.randn(HEADS), torch.randn(HEADS, rows + columns - 1)
        given = dataclasses.replace(inputs, operands=operands)
        ours = given.through(runner_of(spec, dims, dtype))
        said = dataclasses.replace(inputs, operands=(*operands, mask.dense(rows, columns)))
        assert_right(ours, said, dense)


def test_heads_that_make_no_groups_are_refused() -> None:
    runner, inputs = runner_of(PLAIN), random_inputs(3, 70, PLAIN)
    five = torch.cat([inputs.q, inputs.q[:, :1]], 1)
    with pytest.raises(ValueError, match="5 query heads in groups of 2"):
        runner(five, inputs.k, inputs.v, (), ())


@pytest.mark.parametrize("rows", [3, 20])
def test_empty_batch_is_empty(rows: int) -> None:
    inputs = random_inputs(rows, 70, PLAIN, batch=0)
    assert inputs.through(runner_of(PLAIN)).shape == (0, HEADS, rows, 64)
