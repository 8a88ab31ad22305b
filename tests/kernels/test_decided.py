"""The runner and the ops of attentions that are computed as decided."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import policies
import pytest
import sympy
import torch
from check import assert_as_accurate
from decided_plans import BF16, MIXED, WINDOW, flags_of, plan_for
from specs import SPECS, problem_of, random_inputs

from adaattn_compiler.decision import (
    EXACT,
    HeadDecision,
    Pattern,
    Pooling,
    Precision,
    Selection,
)
from adaattn_compiler.kernels.cpu.decided import DecidedRunner, decided_runner
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.decided_kernel import decision_refusal, envelope_refusal
from adaattn_compiler.kernels.envelope import guard_statistics, names
from adaattn_compiler.kernels.patterns import pattern_blocks, sees_itself
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.policy import Envelope, Range
from adaattn_compiler.runtime.state import Column, head_stats, new_state
from adaattn_compiler.spec import EmptyRow, Load, OperandSpec
from adaattn_compiler.spec import k as key
from adaattn_compiler.spec import q as row

# Specs whose masks the input does not decide.
STATIC = sorted(name for name, (spec, _, _) in SPECS.items() if not spec.masks_by_data)


def by_head(problem: Problem, heads: tuple[HeadDecision, ...], dtype: torch.dtype) -> torch.Tensor:
    """Each head by the oracle on the blocks that it keeps, whatever its precision."""
    (q, k, v), operands = random_inputs(problem)
    rows, columns = q.shape[2], k.shape[2]
    out = []
    for head, decision in enumerate(heads):
        kept = torch.ones(rows, columns, dtype=torch.bool)
        if decision.pattern is not None:
            blocks = pattern_blocks(decision.pattern, rows, columns)
            kept = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:rows, :columns]
        out.append(_masked(problem, (q, k, v), operands, kept, dtype)[:, head])
    return torch.stack(out, 1)


def _masked(
    problem: Problem,
    qkv: tuple[torch.Tensor, ...],
    operands: list[torch.Tensor],
    kept: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The oracle where only the kept keys are met."""
    spec = problem.spec
    at = len(spec.operands)
    mask = sympy.And(spec.mask, sympy.Ne(Load(at, row, key), 0))
    spec = dataclasses.replace(spec, mask=mask, operands=(*spec.operands, OperandSpec("bool", 2)))
    wide = [tensor.to(dtype) for tensor in qkv]
    extra = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    return reference_attention(*wide, [*extra, kept], problem.param_hints, spec)


@pytest.mark.parametrize("name", STATIC)
def test_each_head_is_computed_as_decided(name: str) -> None:
    problem = problem_of(name, rows=90, columns=90)
    heads = (EXACT, WINDOW, EXACT, WINDOW)
    tensors, operands = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem, heads))
    state = new_state(4)
    out = runner(*tensors, operands, problem.param_hints, flags_of(problem), state)
    if not sees_itself(problem.spec.mask, 90, 90, problem.param_hints):
        heads = (EXACT,) * 4
    true = by_head(problem, heads, torch.float64)
    eager = by_head(problem, heads, torch.float32)
    assert torch.equal(out.isnan(), true.isnan())
    wrong, allowed = (out - true).nan_to_num().abs().max(), (eager - true).nan_to_num().abs().max()
    assert wrong <= 2 * allowed + 1e-6


def test_precision_is_by_head() -> None:
    problem = problem_of("gqa")
    tensors, operands = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem))
    out = runner(*tensors, operands, (), flags_of(problem), new_state(4))
    true = by_head(problem, MIXED, torch.float64)
    errors = ((out - true).square().sum((0, 2, 3)) / true.square().sum((0, 2, 3))).sqrt()
    assert bool((errors[:2] < 1e-6).all())
    if torch.cpu._is_avx512_bf16_supported():
        assert bool((errors[2:] > 1e-4).all())
    assert bool((errors[2:] < 0.02).all())


def test_heads_whose_flag_is_not_set_are_exact_to_the_bit() -> None:
    problem = problem_of("gqa")
    tensors, operands = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem))
    flags = torch.tensor([[1, 0, 1, 0], [-1, 1, -2, 1]], dtype=torch.int32)
    out = runner(*tensors, operands, (), flags, new_state(4))
    exact = cpp_runner(plan_of(problem))(*tensors, operands, ())
    every = runner(*tensors, operands, (), flags_of(problem), new_state(4))
    chosen = (flags > 0)[..., None, None]
    assert torch.equal(torch.where(chosen, 0.0, out), torch.where(chosen, 0.0, exact))
    assert torch.equal(torch.where(chosen, out, 0.0), torch.where(chosen, every, 0.0))


@pytest.mark.parametrize("name", [*STATIC, "padding"])
def test_audits_see_the_error_of_their_rows(name: str) -> None:
    problem = problem_of(name)
    tensors, operands = random_inputs(problem)
    base = cpp_runner(plan_of(problem))
    exact = base(*tensors, operands, problem.param_hints)
    out = exact + 0.1 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    at = [20, 40, 64, 89]
    sums = base.audit(*tensors, out, operands, problem.param_hints, at)
    clean = base.audit(*tensors, exact, operands, problem.param_hints, at)
    rows = exact[:, :, at].double()
    has_key = rows.isfinite() & (rows != 0)
    wrong = torch.where(has_key, out[:, :, at].double() - rows, 0).square().sum((2, 3))
    torch.testing.assert_close(sums[..., 0], wrong, rtol=1e-4, atol=0)
    whole = torch.where(has_key, rows, 0).square().sum((2, 3))
    torch.testing.assert_close(sums[..., 1], whole, rtol=1e-5, atol=0)
    assert bool((clean[..., 0] <= 1e-10 * clean[..., 1]).all())


def test_a_head_that_is_off_is_computed_exactly_in_the_same_call() -> None:
    problem = problem_of("causal")
    tensors, operands = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem, limit=(1e-3, 1e-3, 1.0, 1.0)))
    state = new_state(4)
    exact = cpp_runner(plan_of(problem))(*tensors, operands, ())
    for turn in range(8):  # one key head after the other, each once
        out = runner(*tensors, operands, (), flags_of(problem), state)
        assert torch.equal(out[:, 1], exact[:, 1]) == (turn == 7)
    stats = head_stats(state)
    assert [head.failed_audit for head in stats] == [0, 2, 0, 0]
    assert [head.as_decided for head in stats] == [16, 14, 16, 16]
    # All in the call in which one was off.
    assert [head.audits for head in stats] == [2, 1, 2, 2]
    assert stats[1].worst is not None
    assert stats[1].worst > 1e-3


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, 90) for name in ("gqa", "alibi", "dense bias", "sink", "last rows")),
        *((name, 5) for name in ("gqa", "softcap", "sink")),
    ],
)
def test_the_library_does_in_one_call_what_the_steps_do(name: str, rows: int) -> None:
    problem = problem_of(name, rows=rows)
    tensors, operands = random_inputs(problem)
    params = problem.param_hints
    plan = plan_for(problem, limit=(1.0, 0.3, 1.0, 0.5), budgets=(1.0, 1.0, 1e-4, 1.0), rows=11)
    runner = DecidedRunner(plan)
    whole, steps = new_state(4), new_state(4)
    every = flags_of(problem)
    some = torch.tensor([[1, 0, -2, 1], [0, 0, 0, 0]], dtype=torch.int32)
    for turn in range(200):
        flags = some if turn % 3 == 1 else every
        one = runner(*tensors, operands, params, flags, whole)
        other = runner._in_steps(*tensors, operands, params, flags, steps)
        assert torch.equal(one, other)
        torch.testing.assert_close(whole, steps, rtol=1e-9, atol=1e-15)
    # Where rows are few all is computed exactly; then only heads that are so anyway have audits.
    assert [bool(head.audits) for head in head_stats(whole)] == [True, *[rows == 90] * 3]
    rounds = torch.cpu._is_avx512_bf16_supported()
    assert bool(whole[2, Column.DEMOTED]) == (rows == 90 and rounds)


@pytest.mark.parametrize("which", [1, 2])
def test_an_open_envelope_lets_no_number_overflow(which: int) -> None:
    problem = problem_of("gqa", rows=90, columns=90)
    tensors, operands = random_inputs(problem)
    tensors[which][..., 7, 3] = torch.finfo(torch.float32).max
    if which == 1:
        tensors[0][..., 3] *= 1e-38
    ours = DecidedRunner(plan_for(problem))(*tensors, operands, (), flags_of(problem), new_state(4))
    exact = cpp_runner(plan_of(problem))(*tensors, operands, ())
    assert exact.isfinite().all()
    wide = [tensor.double() for tensor in tensors]
    oracle = reference_attention(*wide, operands, (), problem.spec)
    assert_as_accurate(ours[:, 2], exact[:, 2], oracle[:, 2])  # that of fewer bits


@pytest.mark.parametrize(
    ("rows", "columns", "decided"),
    [(90, 90, [2, 2, 2, 2]), (5, 90, [2, 0, 0, 0]), (90, 70, [2, 0, 2, 2])],
)
def test_heads_that_may_leave_nothing_out_are_counted_as_exact(
    rows: int, columns: int, decided: list[int]
) -> None:
    # Heads are exact, a pattern, fewer bits, and both: with fewer keys than rows bits are left.
    problem = problem_of("gqa", rows=rows, columns=columns)
    tensors, operands = random_inputs(problem)
    state = new_state(4)
    out = DecidedRunner(plan_for(problem))(*tensors, operands, (), flags_of(problem), state)
    found = head_stats(state)
    assert [head.as_decided for head in found] == decided
    assert [head.nothing_left_out for head in found] == [2 - count for count in decided]
    exact = cpp_runner(plan_of(problem))(*tensors, operands, ())
    for head, count in enumerate(decided):
        assert count or torch.equal(out[:, head], exact[:, head])


def test_flags_and_states_of_another_form_are_refused() -> None:
    problem = problem_of("gqa")
    tensors, operands = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem))
    flags, state = flags_of(problem), new_state(4)
    for wrong in (flags.long(), flags[:1], flags[:, :2]):
        with pytest.raises(ValueError, match="flags"):
            runner(*tensors, operands, (), wrong, state)
    for wrong in (state.float(), state[:3], state[:, :5], new_state(8)[::2]):
        with pytest.raises(ValueError, match="state"):
            runner(*tensors, operands, (), flags, wrong)


def test_moving_averages_are_those_of_the_sums() -> None:
    problem = problem_of("causal")
    tensors, operands = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem))
    state, before = new_state(4), None
    audited = 0
    for turn in range(24):
        runner(*tensors, operands, (), flags_of(problem), state)
        audited += turn % 8 in (0, 5, 6, 7)  # of four key heads one, in half of the calls
        audits = sorted(int(count) for count in state[:, Column.AUDITS])
        assert (sum(audits), audits[-1] - audits[0] <= 1) == (audited, True)
        assert bool((state[:, Column.CALLS] == 2 * (turn + 1)).all())
        if turn == 7:
            before = state[:, [Column.WRONG, Column.WHOLE]].clone()
    assert before is not None
    assert not torch.equal(before, state[:, [Column.WRONG, Column.WHOLE]])
    assert 0.01 < (head_stats(state)[1].error or 0) < 10


def test_a_bias_that_shuts_a_pattern_out_is_computed_exactly() -> None:
    problem = problem_of("dense bias")
    (q, k, v), (bias,) = random_inputs(problem)
    bias[0, 1, 80, 64:] = -math.inf  # all that the window of row 80 keeps
    runner = DecidedRunner(plan_for(problem, (EXACT, WINDOW, EXACT, EXACT)))
    state = new_state(4)
    out = runner(q, k, v, [bias], (), flags_of(problem), state)
    assert torch.equal(out, cpp_runner(plan_of(problem))(q, k, v, [bias], ()))
    assert [head.as_decided for head in head_stats(state)] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(90, 90), (200, 300), (1, 70), (3, 3)])
def test_the_librarys_statistics_are_those_of_torch(dtype, rows: int, columns: int) -> None:
    problem = problem_of("gqa", dtype, rows=rows, columns=columns)
    (q, k, v), _ = random_inputs(problem)
    found = guard_statistics(q, k, v)
    base = cpp_runner(plan_of(problem))
    for factor, inside in ((1e-3, 1), (-1e-3, 0)):
        slack = factor * found.abs() + math.copysign(1e-6, factor)
        low, high = (found - slack)[:, 0].contiguous(), (found + slack)[:, 0].contiguous()
        flags = base.guard(q[:1], k[:1], v[:1], (low, high), new_state(4))
        assert flags.tolist() == [[inside] * 4]


def test_one_statistic_out_of_its_range_is_enough() -> None:
    problem = problem_of("gqa")
    (q, k, v), _ = random_inputs(problem)
    found = guard_statistics(q, k, v)
    base = cpp_runner(plan_of(problem))
    low, high = (found.amin(1) - 1).contiguous(), (found.amax(1) + 1).contiguous()
    assert base.guard(q, k, v, (low, high), new_state(4)).tolist() == [[1] * 4] * 2
    for statistic in range(len(names())):
        narrow = high.clone()
        narrow[statistic, 2] = low[statistic, 2]
        assert base.guard(q, k, v, (low, narrow), new_state(4)).tolist() == [[1, 1, 0, 1]] * 2
    state = new_state(4)
    state[3, Column.DEMOTED] = 1
    assert base.guard(q, k, v, (low, narrow), state).tolist() == [[1, 1, 0, -2]] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_in_no_envelope(value: float) -> None:
    problem = problem_of("causal")
    (q, k, v), _ = random_inputs(problem)
    k[1, 2, 0, 3] = value
    bounds = torch.full((9, 4), -1e30), torch.full((9, 4), 1e30)
    flags = cpp_runner(plan_of(problem)).guard(q, k, v, bounds, new_state(4))
    assert flags.tolist() == [[1] * 4, [1, 1, 0, 1]]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_one_batch_item_teaches_nothing(tensor: int, value: float) -> None:
    problem = problem_of("gqa")
    tensors, operands = random_inputs(problem)
    huge = ((1e4,) * 4,) * 9
    plan = dataclasses.replace(plan_for(problem), high=huge, limit=(9.0,) * 4, budgets=(9.0,) * 4)
    text, state, guarded = plan.serialize(), new_state(4), torch.ops.adaattn.guarded_attention
    bad = [t.clone() for t in tensors]
    bad[tensor][1, 0, 5, 3] = value
    for call in range(130):
        guarded(*(bad if call == 3 else tensors), operands, [], state, text)
    assert bool(state.isfinite().all())
    assert not state[:, Column.DEMOTED].any()
    assert bool((state[:, Column.AUDITS] >= 16).all())


def test_heads_that_a_plan_says_nothing_of_are_refused() -> None:
    problem = problem_of("plain")
    (q, k, v), _ = random_inputs(problem)
    text, many = plan_for(problem).serialize(), [t.repeat(1, 2, 1, 1) for t in (q, k, v)]
    for given, state in ((many, new_state(8)), ((q[:, :2], k[:, :2], v[:, :2]), new_state(2))):
        with pytest.raises(ValueError, match="the plan decides about 4"):
            torch.ops.adaattn.guarded_attention(*given, [], [], state, text)
        with pytest.raises(ValueError, match="the plan decides about 4"):
            torch.ops.adaattn.check_envelope(*given, state, text)


def test_a_threshold_may_be_a_whole_number() -> None:
    problem = problem_of("causal", rows=700, columns=700)
    (q, k, v), _ = random_inputs(problem)
    given = (3 * q, k, v, [], (), flags_of(problem))
    whole, fraction = HeadDecision(skip=9), HeadDecision(skip=9.0)
    assert whole == fraction
    assert isinstance(whole.skip, float)
    plans = [plan_for(problem, (head,) * 4) for head in (whole, fraction)]
    found = [DecidedRunner(plan)(*given, new_state(4)) for plan in plans]
    assert torch.equal(*found)
    exact = cpp_runner(plan_of(problem))(3 * q, k, v, [], ())
    bound = 2 * 700 * math.exp(-9) * float(v.abs().max())  # kernels/bounds.py
    assert (found[0] - exact).abs().max() <= bound


def test_without_keys_nothing_is_as_decided() -> None:
    problem = problem_of("plain", rows=4, columns=0)
    (q, k, v), _ = random_inputs(problem)
    bounds = torch.full((9, 4), -1e30), torch.full((9, 4), 1e30)
    assert cpp_runner(plan_of(problem)).guard(q, k, v, bounds, new_state(4)).sum() == 0


def test_the_ops_are_as_torch_wants_them() -> None:
    problem = problem_of("gqa")
    tensors, operands = random_inputs(problem)
    text = plan_for(problem).serialize()
    state = new_state(4)
    torch.library.opcheck(torch.ops.adaattn.check_envelope, (*tensors, state, text))
    given = (*tensors, operands, [], flags_of(problem), state, text)
    torch.library.opcheck(torch.ops.adaattn.attention_as_decided, given)
    given = (*tensors, operands, [], state, text)
    torch.library.opcheck(torch.ops.adaattn.guarded_attention, given)


@pytest.mark.parametrize("outside", [False, True])
def test_one_op_does_what_the_two_do(outside: bool) -> None:
    problem = problem_of("gqa")
    (q, k, v), operands = random_inputs(problem)
    plan = plan_for(problem)
    if outside:  # the second head
        high = tuple(tuple(-1.0 if head == 1 else x for head, x in enumerate(r)) for r in plan.high)
        plan = dataclasses.replace(plan, high=high)
    text, ops = plan.serialize(), torch.ops.adaattn
    states = new_state(4), new_state(4)
    out = ops.guarded_attention(q, k, v, operands, [], states[0], text)
    flags = ops.check_envelope(q, k, v, states[1], text)
    apart = ops.attention_as_decided(q, k, v, operands, [], flags, states[1], text)
    assert torch.equal(out, apart)
    assert torch.equal(*states)
    assert int(states[0][1, Column.LEFT_ENVELOPE]) == (2 if outside else 0)


def test_plans_survive_being_written() -> None:
    heads = (
        EXACT,
        HeadDecision(pattern=Pattern(100, 3, (1, 2), 4), skip=8.0),
        HeadDecision(selection=Selection(0.9, "antidiagonal", 128, 64)),
        HeadDecision(pooling=Pooling(Pattern(64), 16), values=Precision.FP16),
    )
    plan = plan_for(problem_of("causal"), heads, budgets=(0.1, 1e-300, math.inf, 0.3))
    assert DecidedPlan.deserialize(plan.serialize()) == plan


@pytest.mark.parametrize("text", ["", "{}", "[]", "1", "{'a': 1}", '{"heads": [{"scores": 1}]}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a plan by decisions"):
        decided_runner(text)


@pytest.mark.parametrize(
    ("name", "decision", "why"),
    [
        ("padding", WINDOW, "the mask depends on the input"),
        ("causal padding nan", BF16, "cannot be audited"),
        ("padding", HeadDecision(selection=Selection(0.9)), "the mask depends on the input"),
        ("alibi", HeadDecision(pooling=Pooling(Pattern(0), 8)), "of the product alone"),
        ("causal", HeadDecision(scores=Precision.FP16), "fp32 and bf16"),
    ],
)
def test_decisions_that_do_not_go_with_a_spec_are_refused(name, decision, why: str) -> None:
    assert why in (decision_refusal(problem_of(name), (decision,)) or "")
    assert decision_refusal(problem_of("causal"), (WINDOW, BF16, EXACT)) is None


def test_a_head_is_demoted_for_what_is_sure_and_not_for_one_row() -> None:
    """Both averages end above the budget: one as each audit is, the other by one audit of 40."""
    runner = DecidedRunner(plan_for(problem_of("causal"), budgets=(0.1, 0.1, 0.1, 0.1)))
    state, tried = new_state(4), np.ones((1, 4), dtype=bool)
    for turn in range(40):
        steady, rare, good = 0.15**2, 0.9**2 if turn == 5 else 1e-4, 1e-4
        sums = np.array([[[steady, 1.0], [rare, 1.0], [good, 1.0], [math.nan, 1.0]]])
        runner._note(tried, np.ones((1, 4), dtype=np.int32), sums, state.numpy())
    stats = head_stats(state)
    assert all((head.error or 0.0) > 0.1 for head in stats[:2])
    assert [head.demoted for head in stats] == [True, False, False, True]


@pytest.mark.parametrize("head", [BF16, dataclasses.replace(BF16, skip=9.0)])
def test_a_mask_by_data_that_batch_items_share_is_met(head: HeadDecision) -> None:
    spec = dataclasses.replace(
        SPECS["plain"][0],
        mask=sympy.Ne(Load(0, key), 0),
        empty_row=EmptyRow.ZERO,
        operands=(OperandSpec("bool", 1),),
    )
    problem = dataclasses.replace(problem_of("plain"), spec=spec, operand_shapes=((90,),))
    tensors, operands = random_inputs(problem)
    assert decision_refusal(problem, (head,) * 4) is None
    runner = DecidedRunner(plan_for(problem, (head,) * 4))
    out = runner(*tensors, operands, (), flags_of(problem), new_state(4))
    true = reference_attention(*(t.double() for t in tensors), operands, (), spec)
    assert (out - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize(("rows", "columns"), [(0, 90), (90, 0), (0, 0)])
def test_without_rows_or_keys_all_is_as_the_exact_kernel_has_it(rows: int, columns: int) -> None:
    problem = problem_of("plain", rows=rows, columns=columns)
    tensors, _ = random_inputs(problem)
    plan = plan_for(problem)
    text, state = plan.serialize(), new_state(4)
    flags = torch.ops.adaattn.check_envelope(*tensors, state, text)
    assert flags.shape == (2, 4)
    assert not flags.any()
    for given in (flags, flags_of(problem)):
        out = DecidedRunner(plan)(*tensors, [], (), given, state)
        exact = cpp_runner(plan_of(problem))(*tensors, [], ())
        assert out.shape == exact.shape
        assert torch.equal(out.nan_to_num(), exact.nan_to_num())
        assert torch.equal(out.isnan(), exact.isnan())


def test_dropout_is_refused() -> None:
    problem = problem_of("plain")
    problem = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, dropout_p=0.5))
    assert "dropout is on" in (decision_refusal(problem, (BF16,) * 4) or "")


def test_an_envelope_with_an_unknown_statistic_is_refused() -> None:
    site = policies.site(envelope=Envelope(Range(1, 9), Range(1, 9), {}))
    assert envelope_refusal(site) is None
    wrong = {"q_mx": (Range(0.0, 0.0),) * 6}
    site = policies.site(envelope=Envelope(Range(1, 9), Range(1, 9), wrong))
    assert "'q_mx'" in (envelope_refusal(site) or "")
