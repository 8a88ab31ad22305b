"""Probed rows against the oracle, and what of them a pattern leaves out."""

from __future__ import annotations

import pytest
import torch
from specs import SPECS, problem_of, random_inputs

from adaattn_compiler.decision import Pattern
from adaattn_compiler.kernels.patterns import pattern_blocks
from adaattn_compiler.kernels.probe import probe, probed_rows, relative_error
from adaattn_compiler.kernels.reference import reference_attention

AT = [0, 17, 63, 64, 89]


@pytest.mark.parametrize("name", sorted(SPECS.keys() - {"causal padding uniform"}))
def test_probed_rows_are_those_of_the_attention(name: str) -> None:
    problem = problem_of(name)
    tensors, operands = random_inputs(problem)
    params, spec = problem.param_hints, problem.spec
    found = probe(*tensors, operands, params, spec, AT)
    assert found.exact.dtype == torch.float32
    assert torch.equal(found.error, torch.zeros(2, 4))
    wide = [tensor.double() for tensor in tensors]
    true = reference_attention(*wide, operands, params, spec)[:, :, AT]
    eager = reference_attention(*tensors, operands, params, spec)[:, :, AT]
    seen = true.isfinite() & (true != 0)  # rows without a key are as the spec has them, not here
    wrong = (found.exact - true)[seen].abs().max()
    assert wrong <= 2 * (eager - true)[seen].abs().max() + 1e-6


def test_half_precision_is_probed_in_float32() -> None:
    problem = problem_of("causal", torch.bfloat16)
    tensors, _ = random_inputs(problem)
    found = probe(*tensors, [], (), problem.spec, AT)
    wide = [tensor.double() for tensor in tensors]
    true = reference_attention(*wide, [], (), problem.spec)[:, :, AT]
    torch.testing.assert_close(found.exact.double(), true, rtol=0, atol=1e-5)


def test_the_error_is_that_of_the_kept_keys_alone() -> None:
    problem = problem_of("causal")
    (q, k, v), _ = random_inputs(problem)
    kept = pattern_blocks(Pattern(0), 90, 90).expand(4, -1, -1).clone()
    kept[1] = True
    found = probe(q, k, v, [], (), problem.spec, AT, kept)
    allowed = (
        torch.ones(90, 90).tril().bool()
        & kept[0].repeat_interleave(64, 0).repeat_interleave(64, 1)[:90, :90]
    )
    scores = (problem.spec.scale * q.double() @ k.double().mT).masked_fill(~allowed, -torch.inf)
    true = (scores.softmax(-1) @ v.double())[:, :, AT]
    expected = relative_error(true, found.exact.double())
    torch.testing.assert_close(found.error[:, 0].double(), expected[:, 0], rtol=1e-4, atol=0)
    assert bool((found.error[:, 0] > 0.01).all())
    assert bool((found.error[:, 1] == 0).all())


def test_rows_that_are_not_finite_have_no_error_that_is_within_any_limit() -> None:
    problem = problem_of("causal")
    (q, k, v), _ = random_inputs(problem)
    q[0, 0, 17] = float("nan")
    kept = pattern_blocks(Pattern(0), 90, 90).expand(4, -1, -1)
    error = probe(q, k, v, [], (), problem.spec, AT, kept).error
    assert not bool(error[0, 0] <= torch.inf)


@pytest.mark.parametrize(("rows", "count"), [(4096, 4), (90, 8), (3, 8), (1, 1)])
def test_turns_reach_all_rows(rows: int, count: int) -> None:
    turns = [probed_rows(rows, count, turn) for turn in range(400)]
    for at in turns:
        assert len(at) == min(count, rows)
        assert at == sorted(set(at))
        assert 0 <= at[0] <= at[-1] < rows
    if rows < 1000:
        assert {row for at in turns for row in at} == set(range(rows))
