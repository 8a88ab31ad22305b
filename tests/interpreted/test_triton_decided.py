"""Heads as decided on a GPU, or exactly, in Triton's interpreter; 16 bits are float16 there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from check import assert_as_accurate
from decided_on_gpu import (
    HALF,
    LENGTH,
    LONGER,
    PARTS,
    WHOLE,
    WINDOW,
    assert_right,
    by_blocks,
    exactly,
    flags_in,
    gpu_plan,
    kept_by,
    last_rows,
    order_of_lists,
    problem_named,
    through,
)
from decided_plans import flags_of, plan_for
from specs import random_inputs

from adaattn_compiler.decision import (
    BLOCK,
    EXACT,
    HeadDecision,
    Pattern,
    Pooling,
    Precision,
    Selection,
)
from adaattn_compiler.kernels import audit
from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.cpu.decided import DecidedRunner
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.envelope import guard_statistics
from adaattn_compiler.kernels.patterns import pattern_blocks
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import (
    lowrank_attention,
    reference_attention,
    skipping_attention,
)
from adaattn_compiler.kernels.triton.decided import attention_as_decided, audited_rows, check
from adaattn_compiler.kernels.triton.decided_plan import decisions_of
from adaattn_compiler.kernels.triton.decided_state import noted
from adaattn_compiler.kernels.triton.decided_tables import (
    lists_of,
    numbers_of,
    spread,
    table_shapes,
    tables_by_name,
)
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_lowrank import pooled
from adaattn_compiler.runtime.state import Column, head_stats, new_state

HALF_WINDOW = dataclasses.replace(HALF, pattern=Pattern(0))
CHOSEN = HeadDecision(selection=Selection(0.4, window=0, sinks=0))
ANTIDIAGONAL = HeadDecision(selection=Selection(0.4, "antidiagonal", 0, 0))
MEANS = HeadDecision(pooling=Pooling(Pattern(0), 16))
MIXED = (EXACT, WINDOW, HALF, HALF_WINDOW)
WINDOWS = (EXACT, WINDOW, EXACT, WINDOW)


@pytest.mark.parametrize(
    ("name", "tiles"),
    [("gqa", WHOLE), ("sink", PARTS), ("dense bias", WHOLE), ("prefix at run time", WHOLE)],
    ids=str,
)
def test_each_head_is_computed_as_decided(name: str, tiles: Tiles) -> None:
    length = 70 if tiles == PARTS else LENGTH
    batch = 2 if name == "gqa" else 1
    problem = problem_named(name, batch=batch, rows=length, columns=length)
    ours = through(problem, gpu_plan(problem, MIXED, tiles))
    assert ours.stride() == (length * 4 * 16, 16, 4 * 16, 1)
    assert_right(problem, MIXED, ours)


def test_rows_stand_at_the_end_of_the_keys() -> None:
    problem = problem_named("last rows", rows=30)
    assert not kept_by(problem, MIXED)[:, 1].all()
    assert_right(problem, MIXED, through(problem, gpu_plan(problem, MIXED)))


def test_a_pattern_that_might_leave_rows_without_keys_is_dropped() -> None:
    problem = problem_named("sink of masked rows")
    plan = gpu_plan(problem, WINDOWS)
    assert torch.allclose(through(problem, plan), exactly(problem, plan), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tiles", [WHOLE, PARTS], ids=str)
def test_blocks_are_chosen_in_the_call(tiles: Tiles) -> None:
    problem = problem_named("plain", batch=2, columns=LONGER)
    heads = (CHOSEN, WINDOW, ANTIDIAGONAL, EXACT)
    kept = kept_by(problem, heads)
    assert not kept[:, 0].all()
    assert not torch.equal(kept[0], kept[1])
    assert_right(problem, heads, through(problem, gpu_plan(problem, heads, tiles)))


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("gqa", LENGTH, LENGTH), ("plain", 20, LONGER)]
)
def test_far_keys_stand_for_each_other(name: str, rows: int, columns: int) -> None:
    problem = problem_named(name, rows=rows, columns=columns)
    heads = (MEANS, EXACT, WINDOW, dataclasses.replace(MEANS, pooling=Pooling(Pattern(64), 16)))
    ours = through(problem, gpu_plan(problem, heads))
    (q, k, v), _ = random_inputs(problem)
    means = pooled(k, v, BLOCK, BLOCK // 16)
    structure = block_structure(problem.spec.mask, rows, columns, BLOCK, BLOCK)
    for head in (0, 3):
        near = pattern_blocks(heads[head].pooling.near, rows, columns)
        far = structure.full & ~near
        assert far.any() or (head == 3 and name == "gqa")
        results = [
            lowrank_attention(
                [tensor.to(dtype) for tensor in (q, k, v)],
                [tensor.to(dtype) for tensor in (means.k, means.v, means.log_count)],
                [],
                (),
                problem.spec,
                by_blocks(near | structure.partial, rows, columns),
                far.repeat_interleave(BLOCK, 0)[:rows],
            )[:, head]
            for dtype in (torch.float32, torch.float64)
        ]
        assert_as_accurate(ours[:, head], *results)
    direct = [1, 2]
    plain = through(problem, gpu_plan(problem, (EXACT, *heads[1:3], EXACT)))
    assert torch.equal(ours[:, direct], plain[:, direct])


def test_blocks_whose_scores_are_low_are_skipped() -> None:
    problem = last_rows()
    tensors, _ = random_inputs(problem)
    tensors[0][..., 0] = 4.0
    tensors[1][:, :, :5, 0] = 8.0  # what every row looks at first
    skip, pattern = (math.inf, 2.0, 60.0, 2.0), Pattern(0, 64)
    heads = (
        EXACT,
        HeadDecision(skip=skip[1]),
        HeadDecision(skip=skip[2]),
        HeadDecision(pattern, skip=skip[3]),
    )
    plan = gpu_plan(problem, heads, PARTS).serialize()
    ours, exact = (
        attention_as_decided(*tensors, [], (), flags_of(problem, flag), new_state(4), plan)
        for flag in (1, 0)
    )
    sizes = problem.shape.hints[1:]
    structure = block_structure(problem.spec.mask, *sizes, 32, 32)
    met = (structure.partial | structure.full).expand(1, 4, -1, -1).clone()
    near = spread(pattern_blocks(pattern, *sizes), (32, 32), met.shape[-2:])
    assert not near.all()
    met[:, 3] &= near
    order = order_of_lists(structure, sizes, (32, 32))
    given = ([], (), problem.spec, met, torch.tensor([skip]), (32, 32), 1, order)
    double, _ = skipping_attention([t.double() for t in tensors], *given)
    single, skipped = skipping_attention(tensors, *given)
    assert skipped.any(-1).any(-1).any(0).tolist() == [False, True, False, True]
    for head in range(4):
        assert_as_accurate(ours[:, head], single[:, head], double[:, head])
        assert torch.equal(ours[:, head], exact[:, head]) == (head == 0)


def test_tensors_of_16_bits_are_multiplied_as_they_are() -> None:
    problem = problem_named("gqa", torch.float16)
    plan = gpu_plan(problem, MIXED)
    assert decisions_of(plan.serialize(), False).of_heads == (0, 1, 0, 1)
    ours, exact = through(problem, plan), exactly(problem, plan)
    assert torch.equal(ours[:, [0, 2]], exact[:, [0, 2]])
    assert not torch.equal(ours[:, [1, 3]], exact[:, [1, 3]])


# -- flags, audits and states ----------------------------------------------------------------------


def test_heads_whose_flag_is_not_set_are_exact_to_the_bit() -> None:
    problem = last_rows(batch=2)
    plan = gpu_plan(problem, (MEANS, WINDOW, HALF, CHOSEN))
    flags = torch.tensor([[1, 0, -2, 1], [-1, 1, 1, 0]], dtype=torch.int32)
    ours = through(problem, plan, flags)
    every, exact = through(problem, plan), exactly(problem, plan)
    chosen = (flags > 0)[..., None, None]
    assert torch.equal(ours, torch.where(chosen, every, exact))
    for head in range(4):
        assert not torch.equal(every[:, head], exact[:, head])


@dataclass(frozen=True)
class _Audited:
    """Two calls with one state, of heads that are off, and what they do not depend on."""

    flags: torch.Tensor
    state: torch.Tensor
    ours: torch.Tensor
    every: torch.Tensor
    exact: torch.Tensor


@pytest.fixture(scope="module")
def audited() -> _Audited:
    problem = last_rows(batch=2)
    plan = gpu_plan(problem, WINDOWS, limit=(1.0, 1e-3, 1.0, 10.0), rows=4)
    flags = torch.tensor([[1, 1, 1, 1], [1, 1, 0, -2]], dtype=torch.int32)
    state = new_state(4)
    for _ in range(2):
        ours = through(problem, plan, flags, state)
    every, exact = (
        through(problem, gpu_plan(problem, WINDOWS), flags_of(problem, flag)) for flag in (1, 0)
    )
    return _Audited(flags, state, ours, every, exact)


def test_what_is_off_is_exact_in_the_same_call(audited: _Audited) -> None:
    ours, every, exact = audited.ours, audited.every, audited.exact
    assert torch.equal(ours[:, :3], exact[:, :3])
    assert torch.equal(ours[0, 3], every[0, 3])
    assert torch.equal(ours[1, 3], exact[1, 3])
    stats = head_stats(audited.state)
    assert [head.failed_audit for head in stats] == [0, 4, 0, 0]
    assert [head.as_decided for head in stats] == [4, 0, 2, 2]
    assert [head.left_envelope for head in stats] == [0, 0, 2, 0]
    assert [head.calls for head in stats] == [4] * 4
    assert [head.audits for head in stats] == [2] * 4


def test_errors_are_those_of_the_audited_rows(audited: _Audited) -> None:
    """Of heads as decided at first, whether they stayed so or not; others do not count."""
    errors = []
    for turn in (0, 2):  # calls are counted by batch item
        at = audit.audited_rows(audited.ours.shape[2], 4, turn)
        for head, items in ((1, [0, 1]), (3, [0])):
            given, true = (
                part.double()[items, head][None, :, at] for part in (audited.every, audited.exact)
            )
            wrong, whole = ((x**2).sum() for x in (given - true, true))
            errors.append((head, wrong, whole))
    for head in (1, 3):
        means = [sum(parts[i] for parts in errors if parts[0] == head) / 2 for i in (1, 2)]
        found = audited.state[head, [Column.WRONG, Column.WHOLE]]
        torch.testing.assert_close(found, torch.stack(means), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["dense bias", "alibi", "distance", "sink", "padding"])
def test_audits_of_an_exact_head_find_nothing(name: str) -> None:
    """Rows that stand anywhere are computed as the whole is: each part of a spec is moved."""
    problem = problem_named(name, rows=60, columns=70)
    heads = (EXACT, EXACT, EXACT, HALF)
    state = new_state(4)
    through(problem, gpu_plan(problem, heads, rows=4), None, state)
    *exact, half = (head.error for head in head_stats(state))
    assert max(exact) < 1e-6
    assert 1e-5 < half < 0.01


def test_without_finite_sums_nothing_is_averaged() -> None:
    problem = problem_named("causal")
    tensors, _ = random_inputs(problem)
    tensors[1][0, 1, 75, 3] = math.nan  # seen by the last audited row alone
    assert audit.audited_rows(LENGTH, 4, 0) == [0, 25, 50, 75]
    plan = gpu_plan(problem, WINDOWS, rows=4)
    state, flags = new_state(4), flags_of(problem)
    ours = attention_as_decided(*tensors, [], (), flags, state, plan.serialize())
    assert bool(state.isfinite().all())
    assert bool(ours[0, 1, 75:].isnan().all())
    assert bool(ours[0, 1, :75].isfinite().all())


def test_a_bias_that_shuts_a_pattern_out_is_computed_exactly() -> None:
    problem = problem_named("dense bias")
    (q, k, v), (bias,) = random_inputs(problem)
    bias[0, 1, 90, 64:] = -math.inf  # all that the window of row 90 keeps
    plan, state = gpu_plan(problem, WINDOWS), new_state(4)
    given = (q, k, v, [bias], ())
    ours = attention_as_decided(*given, flags_of(problem), state, plan.serialize())
    flags = flags_of(problem, 0)
    exact = attention_as_decided(*given, flags, new_state(4), plan.serialize())
    assert torch.equal(ours[:, 1], exact[:, 1])
    assert not torch.equal(ours[:, 3], exact[:, 3])
    assert [head.failed_audit for head in head_stats(state)] == [0, 1, 0, 0]


@pytest.mark.parametrize(("rows", "count"), [(150, 2), (4096, 4), (3, 5)])
def test_audited_rows_are_those_of_the_cpu(rows: int, count: int) -> None:
    for turn in range(200):
        state = new_state(1)
        state[0, Column.CALLS] = turn
        assert audited_rows(state, rows, count).tolist() == audit.audited_rows(rows, count, turn)


def test_states_are_kept_as_on_the_cpu() -> None:
    problem = problem_named("gqa")
    budgets = (0.5, 0.05, 0.5, 1e-3)
    runner = DecidedRunner(plan_for(problem, WINDOWS, budgets=budgets))
    generator = torch.Generator().manual_seed(3)
    ours, theirs = new_state(4), new_state(4)
    for _ in range(60):
        flags = torch.randint(-2, 2, (2, 4), generator=generator, dtype=torch.int32)
        tried = flags.abs() == 1  # those that failed were tried, too
        sums = torch.rand(2, 4, 2, generator=generator, dtype=torch.float64)
        sums[..., 0] *= 0.02 * torch.arange(4)
        ours = noted(ours, flags, tried, sums, torch.tensor(budgets, dtype=torch.float64))
        runner._note(tried.numpy(), flags.numpy(), sums.numpy(), theirs.numpy())
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert ours[:, Column.DEMOTED].tolist() == [0, 1, 0, 1]


# -- guards ----------------------------------------------------------------------------------------


def within(problem: Problem, heads: tuple[HeadDecision, ...] = MIXED) -> DecidedPlan:
    """A plan that lets through what the statistics of the usual inputs are, about."""
    (q, k, v), _ = random_inputs(problem)
    found = guard_statistics(q, k, v)
    bounds = {"low": (found.amin(1) / 2).tolist(), "high": (found.amax(1) * 2).tolist()}
    return gpu_plan(problem, heads, **{n: tuple(map(tuple, b)) for n, b in bounds.items()})


def test_shifted_inputs_are_exact() -> None:
    problem = problem_named("gqa", batch=2)
    plan = within(problem)
    (q, k, v), _ = random_inputs(problem)
    assert flags_in(plan, q, k, v) == [[1] * 4] * 2
    assert flags_in(plan, 30 * q, k, v) == [[0] * 4] * 2
    assert flags_in(plan, q, k, v[:, :, :1].expand_as(v)) == [[0] * 4] * 2
    larger = k.clone()
    larger[1, 0] *= 30  # of the first two query heads
    assert flags_in(plan, q, larger, v) == [[1] * 4, [0, 0, 1, 1]]
    shifted = (30 * q, k, v, [], ())
    state = new_state(4)
    flags = check(*shifted[:3], state, plan.serialize())
    ours = attention_as_decided(*shifted, flags, state, plan.serialize())
    exact = reference_attention(*(t.double() for t in shifted[:3]), [], (), problem.spec)
    eager = reference_attention(*shifted[:3], [], (), problem.spec)
    assert_as_accurate(ours, eager, exact)
    assert [head.left_envelope for head in head_stats(state)] == [2] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_wherever_a_pattern_might_hide_it(value: float) -> None:
    problem = problem_named("causal", batch=2)
    plan = gpu_plan(problem, (EXACT, WINDOW, CHOSEN, MEANS))
    (q, k, v), _ = random_inputs(problem)
    for tensor in (k, v):
        kept = tensor.clone()
        tensor[1, :, 1, 3] = value  # no statistic has this row
        assert flags_in(plan, q, k, v) == [[1] * 4, [1, 0, 0, 0]]
        tensor.copy_(kept)


def test_what_float16_cannot_hold_is_not_rounded_to_it() -> None:
    problem = problem_named("causal", batch=2)
    (q, k, v), _ = random_inputs(problem)
    v[0, :, 1, 3] = 1e5
    values = dataclasses.replace(EXACT, values=Precision.FP16)
    scores = dataclasses.replace(EXACT, scores=Precision.FP16)
    plan = gpu_plan(problem, (EXACT, values, scores, HALF))
    assert flags_in(plan, q, k, v) == [[1, 0, 1, 0], [1] * 4]


def test_a_demoted_head_stays_exact() -> None:
    problem = last_rows()
    plan, state = gpu_plan(problem, MIXED, budgets=(1.0, 1.0, 0.1, 1.0), rows=4), new_state(4)
    (q, k, v), _ = random_inputs(problem)
    state[:, Column.AUDITS] = 15
    state[2, [Column.WRONG, Column.WHOLE, Column.SQUARE]] = 1.0
    through(problem, plan, check(q, k, v, state, plan.serialize()), state)
    assert state[:, Column.DEMOTED].tolist() == [0, 0, 1, 0]
    flags = check(q, k, v, state, plan.serialize())
    assert flags.tolist() == [[1, 1, -2, 1]]
    ours = through(problem, plan, flags, state)
    assert torch.equal(ours[:, 2], exactly(problem, plan)[:, 2])


# -- tables ----------------------------------------------------------------------------------------


def test_lists_hold_what_is_seen_once() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 3, 5, 7, generator=generator) > 0.4
    cut = torch.rand(5, 7, generator=generator) > 0.6
    found = lists_of(seen, cut)
    for place, (first, count, cut_first, cut_count) in zip(
        itertools.product(range(2), range(3), range(5)),
        found.table.flatten(0, 2).tolist(),
        strict=True,
    ):
        whole = found.blocks[first : first + count].tolist()
        masked = found.blocks[cut_first : cut_first + cut_count].tolist()
        assert whole == (seen[place] & ~cut[place[-1]]).nonzero().flatten().tolist()
        assert masked == (seen[place] & cut[place[-1]]).nonzero().flatten().tolist()


@pytest.mark.parametrize("heads", [MIXED, (CHOSEN, WINDOW, EXACT, MEANS), (MEANS,) * 4])
def test_shapes_of_tables_follow_from_the_lengths(heads: tuple[HeadDecision, ...]) -> None:
    problem = problem_named("gqa")
    plan = gpu_plan(problem, heads, PARTS).serialize()
    found = decisions_of(plan, True)
    made = tables_by_name(found, 70, LENGTH, ())
    for name, (shape, dtype) in table_shapes(found, 70, LENGTH).items():
        assert (tuple(made[name].shape), made[name].dtype) == (shape, dtype)
    (q, _, _), _ = random_inputs(problem)
    numbers = numbers_of(plan, True)
    for op, given in (("decided_numbers", (numbers,)), ("decided_tables", (70, LENGTH, [], plan))):
        torch.library.opcheck(getattr(torch.ops.adaattn, op), (q, *given))


def test_what_a_plan_is_not_for_is_refused() -> None:
    problem = problem_named("gqa")
    (q, k, v), _ = random_inputs(problem)
    text, state, flags = gpu_plan(problem, MIXED).serialize(), new_state(4), flags_of(problem)
    with pytest.raises(ValueError, match="not a plan by decisions for a GPU"):
        check(q, k, v, state, plan_for(problem).serialize())
    with pytest.raises(ValueError, match="differ in B or N"):
        attention_as_decided(q, k, v[:, :, :5], [], (), flags, state, text)
    with pytest.raises(ValueError, match="flags"):
        attention_as_decided(q, k, v, [], (), flags.long(), state, text)
    with pytest.raises(ValueError, match="state"):
        attention_as_decided(q, k, v, [], (), flags, state[:3], text)


@pytest.mark.parametrize(("batch", "rows", "columns"), [(2, 0, 64), (2, 20, 0), (0, 20, 64)])
def test_without_elements_nothing_is_as_decided(batch: int, rows: int, columns: int) -> None:
    problem = problem_named("plain")
    plan, state = gpu_plan(problem, MIXED, rows=2).serialize(), new_state(4)
    q = torch.randn(batch, 4, rows, 16)
    k, v = (torch.randn(batch, 4, columns, 16) for _ in range(2))
    flags = check(q, k, v, state, plan)
    assert flags.shape == (batch, 4)
    assert not flags.any()
    ours = attention_as_decided(q, k, v, [], (), flags, state, plan)
    assert ours.shape == (batch, 4, rows, 16)
    assert state[:, Column.CALLS].tolist() == [batch] * 4
