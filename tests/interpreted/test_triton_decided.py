"""Heads as decided on a GPU, or exactly, in Triton's interpreter; 16 bits are float16 there."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import sympy
import torch
from check import assert_as_accurate
from decided_plans import flags_of, plan_for
from specs import problem_of, random_inputs

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
from adaattn_compiler.kernels.selection import selected_blocks
from adaattn_compiler.kernels.triton.decided import attention_as_decided, audited_rows, check
from adaattn_compiler.kernels.triton.decided_plan import base_of, decisions_of
from adaattn_compiler.kernels.triton.decided_state import noted
from adaattn_compiler.kernels.triton.decided_tables import (
    lists_of,
    spread,
    table_shapes,
    tables_by_name,
)
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_lowrank import pooled
from adaattn_compiler.runtime.state import Column, head_stats, new_state
from adaattn_compiler.spec import Load, OperandSpec, b, h
from adaattn_compiler.spec import k as key
from adaattn_compiler.spec import q as row
from adaattn_compiler.target import TARGETS

LENGTH = 150
WHOLE, PARTS = Tiles(64, 64), Tiles(32, 32)
WINDOW = HeadDecision(pattern=Pattern(0))
HALF = HeadDecision(scores=Precision.FP16, values=Precision.FP16)
HALF_WINDOW = dataclasses.replace(HALF, pattern=Pattern(0))
CHOSEN = HeadDecision(selection=Selection(0.4, window=0, sinks=0))
ANTIDIAGONAL = HeadDecision(selection=Selection(0.4, "antidiagonal", 0, 0))
MEANS = HeadDecision(pooling=Pooling(Pattern(0), 16))
MIXED = (EXACT, WINDOW, HALF, HALF_WINDOW)
WINDOWS = (EXACT, WINDOW, EXACT, WINDOW)


def problem_named(name: str, dtype: torch.dtype = torch.float32, rows: int = LENGTH) -> Problem:
    problem = problem_of(name, dtype, rows=rows, columns=LENGTH)
    sizes = {90: LENGTH, 179: 2 * LENGTH - 1}
    shapes = tuple(tuple(sizes.get(n, n) for n in shape) for shape in problem.operand_shapes)
    return dataclasses.replace(problem, operand_shapes=shapes)


def gpu_plan(
    problem: Problem,
    heads: tuple[HeadDecision, ...] = MIXED,
    tiles: Tiles = WHOLE,
    **fields: object,
) -> DecidedPlan:
    """What no guard stops, but for what `fields` say."""
    dtypes = tuple(operand.dtype for operand in random_inputs(problem)[1])
    on_gpu = dataclasses.replace(problem, device="cuda", operand_dtypes=dtypes)
    base = base_of(on_gpu, tiles, TARGETS["H100"], 4)
    return plan_for(problem, heads, **{"base": base, "rows": 0, **fields})


def through(
    problem: Problem,
    plan: DecidedPlan,
    flags: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> torch.Tensor:
    tensors, operands = random_inputs(problem)
    return attention_as_decided(
        *tensors,
        operands,
        problem.param_hints,
        flags_of(problem) if flags is None else flags,
        new_state(len(plan.heads)) if state is None else state,
        plan.serialize(),
    )


def exactly(problem: Problem, plan: DecidedPlan) -> torch.Tensor:
    return through(problem, plan, flags_of(problem, 0))


def reference(problem: Problem, dtype: torch.dtype, kept: torch.Tensor) -> torch.Tensor:
    """The oracle where rows meet the kept keys, bool [B,H,M,N], alone."""
    tensors, operands = random_inputs(problem)
    spec = problem.spec
    at = len(spec.operands)
    mask = sympy.And(spec.mask, sympy.Ne(Load(at, b, h, row, key), 0))
    spec = dataclasses.replace(spec, mask=mask, operands=(*spec.operands, OperandSpec("bool", 4)))
    wide = [tensor.to(dtype) for tensor in tensors]
    extra = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    return reference_attention(*wide, [*extra, kept], problem.param_hints, spec)


def by_blocks(blocks: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return blocks.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]


def kept_by(problem: Problem, heads: tuple[HeadDecision, ...]) -> torch.Tensor:
    """bool [B,H,M,N], the mask apart."""
    (q, k, _), _ = random_inputs(problem)
    sizes = (q.shape[2], k.shape[2])
    structure = block_structure(problem.spec.mask, *sizes, BLOCK, BLOCK, problem.param_hints)
    allowed = structure.partial | structure.full
    every = []
    for head, decision in enumerate(heads):
        blocks = torch.ones_like(allowed).expand(q.shape[0], *allowed.shape)
        if decision.pattern is not None:
            blocks = pattern_blocks(decision.pattern, *sizes).expand_as(blocks)
        if decision.selection is not None:
            scale = problem.spec.scale
            whole = None if problem.spec.mask == sympy.true else structure.full
            blocks = selected_blocks(decision.selection, q, k, scale, allowed, whole)[:, head]
        every.append(by_blocks(blocks, *sizes))
    return torch.stack(every, 1)


def assert_right(problem: Problem, heads: tuple[HeadDecision, ...], ours: torch.Tensor) -> None:
    """As accurate as the oracle in the same precision, on the keys that heads keep."""
    kept = kept_by(problem, heads)
    exact = reference(problem, torch.float64, kept)
    assert torch.equal(ours.isnan(), exact.isnan())
    for head, decision in enumerate(heads):
        rounded = decision.scores == Precision.FP16
        eager = reference(problem, torch.float16 if rounded else torch.float32, kept).float()
        assert_as_accurate(ours[:, head].float(), eager[:, head], exact[:, head])


@pytest.mark.parametrize(
    ("name", "tiles"),
    [("gqa", WHOLE), ("sink", PARTS), ("dense bias", WHOLE), ("prefix at run time", WHOLE)],
    ids=str,
)
def test_each_head_is_computed_as_decided(name: str, tiles: Tiles) -> None:
    problem = problem_named(name)
    ours = through(problem, gpu_plan(problem, MIXED, tiles))
    assert ours.stride() == (LENGTH * 4 * 16, 16, 4 * 16, 1)
    assert_right(problem, MIXED, ours)


def test_rows_stand_at_the_end_of_the_keys() -> None:
    problem = problem_named("last rows", rows=40)
    assert_right(problem, MIXED, through(problem, gpu_plan(problem)))


def test_a_pattern_that_might_leave_rows_without_keys_is_dropped() -> None:
    problem = problem_named("sink of masked rows")
    plan = gpu_plan(problem, WINDOWS)
    assert torch.allclose(through(problem, plan), exactly(problem, plan), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tiles", [WHOLE, PARTS], ids=str)
def test_blocks_are_chosen_in_the_call(tiles: Tiles) -> None:
    problem = problem_named("plain")
    heads = (CHOSEN, WINDOW, ANTIDIAGONAL, EXACT)
    kept = kept_by(problem, heads)
    assert not kept[:, 0].all()
    assert not torch.equal(kept[0], kept[1])
    assert_right(problem, heads, through(problem, gpu_plan(problem, heads, tiles)))


@pytest.mark.parametrize("name", ["gqa", "plain"])
def test_far_keys_stand_for_each_other(name: str) -> None:
    problem = problem_named(name)
    heads = (MEANS, EXACT, WINDOW, dataclasses.replace(MEANS, pooling=Pooling(Pattern(64), 16)))
    ours = through(problem, gpu_plan(problem, heads))
    (q, k, v), _ = random_inputs(problem)
    means = pooled(k, v, BLOCK, BLOCK // 16)
    structure = block_structure(problem.spec.mask, LENGTH, LENGTH, BLOCK, BLOCK)
    for head in (0, 3):
        near = pattern_blocks(heads[head].pooling.near, LENGTH, LENGTH)
        far = structure.full & ~near
        assert head or far.any()
        results = [
            lowrank_attention(
                [tensor.to(dtype) for tensor in (q, k, v)],
                [tensor.to(dtype) for tensor in (means.k, means.v, means.log_count)],
                [],
                (),
                problem.spec,
                by_blocks(near | structure.partial, LENGTH, LENGTH),
                far.repeat_interleave(BLOCK, 0)[:LENGTH],
            )[:, head]
            for dtype in (torch.float32, torch.float64)
        ]
        assert_as_accurate(ours[:, head], *results)
    direct = [1, 2]
    plain = through(problem, gpu_plan(problem, (EXACT, *heads[1:3], EXACT)))
    assert torch.equal(ours[:, direct], plain[:, direct])


def test_blocks_whose_scores_are_low_are_skipped() -> None:
    problem = problem_named("gqa")
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
    structure = block_structure(problem.spec.mask, LENGTH, LENGTH, 32, 32)
    met = (structure.partial | structure.full).expand(1, 4, -1, -1).clone()
    near = pattern_blocks(pattern, LENGTH, LENGTH)
    met[:, 3] &= spread(near, (32, 32), met.shape[-2:])
    # Whole blocks come first, then those that the mask cuts: the same order.
    given = ([], (), problem.spec, met, torch.tensor([skip]), (32, 32), 1)
    double, _ = skipping_attention([t.double() for t in tensors], *given)
    single, skipped = skipping_attention(tensors, *given)
    assert skipped.any(-1).any(-1).any(0).tolist() == [False, True, False, True]
    for head in range(4):
        assert_as_accurate(ours[:, head], single[:, head], double[:, head])
        assert torch.equal(ours[:, head], exact[:, head]) == (head in (0, 2))


def test_tensors_of_16_bits_are_multiplied_as_they_are() -> None:
    problem = problem_named("gqa", torch.float16)
    plan = gpu_plan(problem)
    assert decisions_of(plan.serialize(), False).of_heads == (0, 1, 0, 1)
    ours, exact = through(problem, plan), exactly(problem, plan)
    assert torch.equal(ours[:, [0, 2]], exact[:, [0, 2]])
    assert not torch.equal(ours[:, [1, 3]], exact[:, [1, 3]])


# -- flags, audits and states ----------------------------------------------------------------------


def test_heads_whose_flag_is_not_set_are_exact_to_the_bit() -> None:
    problem = problem_named("gqa")
    plan = gpu_plan(problem, (MEANS, WINDOW, HALF, CHOSEN))
    flags = torch.tensor([[1, 0, -2, 1], [-1, 1, 1, 0]], dtype=torch.int32)
    ours = through(problem, plan, flags)
    every, exact = through(problem, plan), exactly(problem, plan)
    chosen = (flags > 0)[..., None, None]
    assert torch.equal(ours, torch.where(chosen, every, exact))
    for head in range(4):
        assert not torch.equal(every[:, head], exact[:, head])


def test_what_is_off_is_exact_in_the_same_call() -> None:
    problem = problem_named("causal")
    plan = gpu_plan(problem, WINDOWS, limit=(1.0, 1e-3, 1.0, 10.0), rows=4)
    flags = torch.tensor([[1, 1, 1, 1], [1, 1, 0, -2]], dtype=torch.int32)
    state = new_state(4)
    for _ in range(2):
        ours = through(problem, plan, flags, state)
    every, exact = through(problem, plan), exactly(problem, plan)
    assert torch.equal(ours[:, :3], exact[:, :3])
    assert torch.equal(ours[0, 3], every[0, 3])
    assert torch.equal(ours[1, 3], exact[1, 3])
    stats = head_stats(state)
    assert [head.failed_audit for head in stats] == [0, 4, 0, 0]
    assert [head.as_decided for head in stats] == [4, 0, 2, 2]
    assert [head.left_envelope for head in stats] == [0, 0, 2, 0]
    assert [head.calls for head in stats] == [4] * 4
    assert [head.audits for head in stats] == [2] * 4


def test_errors_are_those_of_the_audited_rows() -> None:
    """Of heads as decided at first, whether they stayed so or not; others do not count."""
    problem = problem_named("causal")
    plan = gpu_plan(problem, WINDOWS, limit=(1.0, 1e-3, 1.0, 10.0), rows=4)
    flags = torch.tensor([[1, 1, 1, 1], [1, 1, 0, -2]], dtype=torch.int32)
    state, errors = new_state(4), []
    every, exact = (
        part.double()
        for part in (through(problem, gpu_plan(problem, WINDOWS)), exactly(problem, plan))
    )
    for turn in (0, 2):  # calls are counted by batch item
        through(problem, plan, flags, state)
        at = audit.audited_rows(LENGTH, 4, turn)
        for head, items in ((1, [0, 1]), (3, [0])):
            given, true = (part[items, head][None, :, at] for part in (every, exact))
            wrong, whole = ((x**2).sum() for x in (given - true, true))
            errors.append((head, wrong, whole))
    for head in (1, 3):
        means = [sum(parts[i] for parts in errors if parts[0] == head) / 2 for i in (1, 2)]
        found = state[head, [Column.WRONG, Column.WHOLE]]
        torch.testing.assert_close(found, torch.stack(means), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["dense bias", "alibi", "distance", "sink", "padding"])
def test_audits_of_an_exact_head_find_nothing(name: str) -> None:
    """Rows that stand anywhere are computed as the whole is: each part of a spec is moved."""
    problem = problem_named(name)
    heads = (EXACT, EXACT, EXACT, HALF)
    state = new_state(4)
    through(problem, gpu_plan(problem, heads, rows=4), None, state)
    *exact, half = (head.error for head in head_stats(state))
    assert max(exact) < 1e-6
    assert 1e-5 < half < 0.01


def test_without_finite_sums_nothing_is_averaged() -> None:
    problem = problem_named("causal")
    tensors, _ = random_inputs(problem)
    tensors[1][0, 1, 149, 3] = math.nan  # seen by the last row alone
    plan = gpu_plan(problem, WINDOWS, rows=LENGTH)
    state, flags = new_state(4), flags_of(problem)
    ours = attention_as_decided(*tensors, [], (), flags, state, plan.serialize())
    assert bool(state.isfinite().all())
    assert bool(ours[0, 1, 149].isnan().all())
    assert bool(ours[0, 1, :149].isfinite().all())


def test_a_bias_that_shuts_a_pattern_out_is_computed_exactly() -> None:
    problem = problem_named("dense bias")
    (q, k, v), (bias,) = random_inputs(problem)
    bias[0, 1, 140, 128:] = -math.inf  # all that the window of row 140 keeps
    plan, state = gpu_plan(problem, WINDOWS), new_state(4)
    given = (q, k, v, [bias], ())
    ours = attention_as_decided(*given, flags_of(problem), state, plan.serialize())
    flags = flags_of(problem, 0)
    exact = attention_as_decided(*given, flags, new_state(4), plan.serialize())
    assert torch.equal(ours[:, 1], exact[:, 1])
    assert not torch.equal(ours[:, 3], exact[:, 3])
    assert [head.failed_audit for head in head_stats(state)] == [0, 2, 0, 0]


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


def flags_in(plan: DecidedPlan, *tensors: torch.Tensor) -> list[list[int]]:
    return check(*tensors, new_state(4), plan.serialize()).tolist()


def test_shifted_inputs_are_exact() -> None:
    problem = problem_named("gqa")
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
    problem = problem_named("causal")
    plan = gpu_plan(problem, (EXACT, WINDOW, CHOSEN, MEANS))
    (q, k, v), _ = random_inputs(problem)
    for tensor in (k, v):
        kept = tensor.clone()
        tensor[1, :, 1, 3] = value  # no statistic has this row
        assert flags_in(plan, q, k, v) == [[1] * 4, [1, 0, 0, 0]]
        tensor.copy_(kept)


def test_what_float16_cannot_hold_is_not_rounded_to_it() -> None:
    problem = problem_named("causal")
    (q, k, v), _ = random_inputs(problem)
    v[0, :, 1, 3] = 1e5
    values = dataclasses.replace(EXACT, values=Precision.FP16)
    scores = dataclasses.replace(EXACT, scores=Precision.FP16)
    plan = gpu_plan(problem, (EXACT, values, scores, HALF))
    assert flags_in(plan, q, k, v) == [[1, 0, 1, 0], [1] * 4]


def test_a_demoted_head_stays_exact() -> None:
    problem = problem_named("gqa")
    plan, state = gpu_plan(problem, budgets=(1.0, 1.0, 0.1, 1.0), rows=4), new_state(4)
    (q, k, v), _ = random_inputs(problem)
    state[:, Column.AUDITS] = 15
    state[2, [Column.WRONG, Column.WHOLE, Column.SQUARE]] = 1.0
    through(problem, plan, check(q, k, v, state, plan.serialize()), state)
    assert state[:, Column.DEMOTED].tolist() == [0, 0, 1, 0]
    flags = check(q, k, v, state, plan.serialize())
    assert flags.tolist() == [[1, 1, -2, 1]] * 2
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
    for op, given in (("decided_numbers", ()), ("decided_tables", (70, LENGTH, []))):
        torch.library.opcheck(getattr(torch.ops.adaattn, op), (q, *given, plan))


def test_what_a_plan_is_not_for_is_refused() -> None:
    problem = problem_named("gqa")
    (q, k, v), _ = random_inputs(problem)
    text, state, flags = gpu_plan(problem).serialize(), new_state(4), flags_of(problem)
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
    plan, state = gpu_plan(problem, rows=2).serialize(), new_state(4)
    q = torch.randn(batch, 4, rows, 16)
    k, v = (torch.randn(batch, 4, columns, 16) for _ in range(2))
    flags = check(q, k, v, state, plan)
    assert flags.shape == (batch, 4)
    assert not flags.any()
    ours = attention_as_decided(q, k, v, [], (), flags, state, plan)
    assert ours.shape == (batch, 4, rows, 16)
    assert state[:, Column.CALLS].tolist() == [batch] * 4
