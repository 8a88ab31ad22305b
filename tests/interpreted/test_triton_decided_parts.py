"""Heads in a basis of keys and through landmarks on a GPU, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from check import assert_as_accurate
from decided_on_gpu import (
    HALF,
    LONGER,
    PARTS,
    WINDOW,
    assert_right,
    exactly,
    flags_in,
    gpu_plan,
    kept_by,
    last_rows,
    order_of_lists,
    problem_named,
    through,
)
from decided_plans import flags_of
from specs import random_inputs

from adaattn_compiler.decision import (
    EXACT,
    HeadDecision,
    KeyBasis,
    Nystrom,
    Pattern,
    Pooling,
)
from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.decided_gpu import decision_refusal
from adaattn_compiler.kernels.means import means_of_any_length, means_of_runs
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import nystrom_attention, skipping_attention
from adaattn_compiler.kernels.triton.decided import attention_as_decided
from adaattn_compiler.kernels.triton.decided_plan import Way, decisions_of
from adaattn_compiler.kernels.triton.decided_tables import (
    bases_of,
    decided_bases,
    numbers_of,
    without_bases,
)
from adaattn_compiler.kernels.triton.launch import Products
from adaattn_compiler.runtime.state import head_stats, new_state
from adaattn_compiler.target import TARGETS


def basis(rank: int = 8, seed: int = 0) -> KeyBasis:
    generator = torch.Generator().manual_seed(seed)
    full, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    return KeyBasis.of(full[:, :rank])


IN_BASIS = HeadDecision(basis=basis())
LANDMARKS = HeadDecision(nystrom=Nystrom(16))
NEAR_IN_BASIS = dataclasses.replace(IN_BASIS, pattern=Pattern(0))


def bidirectional(batch: int = 1, group: int = 1, dtype: torch.dtype = torch.float32) -> Problem:
    """Ragged: 20 rows and 100 keys."""
    return problem_named("plain", dtype, batch=batch, rows=20, group=group)


# -- in a basis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gqa", "alibi", "sink", "dense bias", "padding"])
def test_scores_in_a_basis_of_keys(name: str) -> None:
    problem = problem_named(name)
    patterned = IN_BASIS if name == "padding" else NEAR_IN_BASIS
    other = HeadDecision(basis=basis(8, 1))
    heads = (IN_BASIS, patterned, other, EXACT)
    assert kept_by(problem, heads)[:, 1].all() == (name == "padding")
    assert_right(problem, heads, through(problem, gpu_plan(problem, heads)))


def test_each_rank_and_precision_has_a_launch_of_its_own() -> None:
    problem = last_rows()
    narrow = dataclasses.replace(NEAR_IN_BASIS, scores=HALF.scores, values=HALF.values)
    heads = (narrow, WINDOW, IN_BASIS, HeadDecision(basis=basis()))
    plan = gpu_plan(problem, heads)
    found = decisions_of(plan.serialize(), True)
    plain, halves = Products(), Products("fp16", "fp16")
    assert found.ways == (Way(plain), Way(halves, rank=8), Way(plain, rank=8))
    assert (found.of_heads, found.direct, found.ranks) == ((2, 1, 3, 3), 1, (8,))
    assert_right(problem, heads, through(problem, plan))


def test_blocks_are_skipped_by_their_scores_in_the_basis() -> None:
    problem = last_rows()
    tensors, _ = random_inputs(problem)
    tensors[0][..., 0] = 4.0
    tensors[1][:, :, :5, 0] = 8.0  # what every row looks at first
    turn = torch.eye(16)[:, :8]
    heads = (EXACT, EXACT, EXACT, HeadDecision(basis=KeyBasis.of(turn), skip=2.0))
    plan = gpu_plan(problem, heads, PARTS).serialize()
    ours = attention_as_decided(*tensors, [], (), flags_of(problem), new_state(4), plan)
    sizes = problem.shape.hints[1:]
    structure = block_structure(problem.spec.mask, *sizes, 32, 32)
    met = (structure.partial | structure.full)[None, None]
    order = order_of_lists(structure, sizes, (32, 32))
    skip = torch.tensor([[math.inf] * 3 + [2.0]])
    results = []
    for dtype in (torch.float32, torch.float64):
        q, k, v = (tensor.to(dtype) for tensor in tensors)
        given = ([q @ turn.to(dtype), k @ turn.to(dtype), v], [], (), problem.spec)
        result, skipped = skipping_attention(*given, met, skip, (32, 32), 1, order)
        results.append(result[:, 3])
    assert skipped[:, 3].any()
    assert_as_accurate(ours[:, 3], *results)


# -- through landmarks -----------------------------------------------------------------------------


def assert_through_landmarks(
    problem: Problem, heads: tuple[HeadDecision, ...], ours: torch.Tensor
) -> None:
    """The pseudo-inverse takes what is off in the weights times its own size."""
    tensors, _ = random_inputs(problem)
    spec = problem.spec
    for head, decision in enumerate(heads):
        if decision.nystrom is not None:
            count = decision.nystrom.landmarks
            eager, exact = (
                nystrom_attention([t.to(dtype) for t in tensors], count, spec.scale, spec.group)
                for dtype in (problem.dtype, torch.float64)
            )
            wrong, allowed = ((x - exact)[:, head].abs().max() for x in (ours, eager))
            assert wrong <= 4 * allowed + 1e-6


def test_all_rows_and_keys_through_landmarks() -> None:
    problem = bidirectional(group=2)
    heads = (LANDMARKS, WINDOW, HeadDecision(nystrom=Nystrom(64)), LANDMARKS)
    ours = through(problem, gpu_plan(problem, heads))
    assert_through_landmarks(problem, heads, ours)
    assert_right(problem, heads, ours)


def test_in_16_bits_too() -> None:
    """Turned rows, and values of landmarks, are rounded to the tensors' type."""
    problem = bidirectional(dtype=torch.float16)
    heads = (IN_BASIS, LANDMARKS, EXACT, NEAR_IN_BASIS)
    plan = gpu_plan(problem, heads)
    assert sorted(decisions_of(plan.serialize(), False).of_heads) == [0, 1, 1, 2]
    ours = through(problem, plan)
    assert_right(problem, heads, ours)
    assert_through_landmarks(problem, heads, ours)


def test_means_are_those_of_the_cpu_whatever_the_length() -> None:
    for length, count in ((150, 16), (64, 16), (20, 64), (1, 16), (129, 128)):
        rows = torch.randn(2, 3, length, 4)
        theirs = means_of_runs(rows, -(-length // count))
        torch.testing.assert_close(means_of_any_length(rows, count), theirs)


# -- flags, audits, guards -------------------------------------------------------------------------


def test_heads_whose_flag_is_not_set_are_exact_to_the_bit() -> None:
    problem = bidirectional(batch=2)
    plan = gpu_plan(problem, (LANDMARKS, IN_BASIS, NEAR_IN_BASIS, LANDMARKS))
    flags = torch.tensor([[1, 0, -2, 0], [-1, 1, 1, 1]], dtype=torch.int32)
    ours = through(problem, plan, flags)
    every, exact = through(problem, plan), exactly(problem, plan)
    assert torch.equal(ours, torch.where((flags > 0)[..., None, None], every, exact))
    for head in range(4):
        assert not torch.equal(every[:, head], exact[:, head])


def test_what_is_off_is_exact_in_the_same_call() -> None:
    problem = bidirectional()
    heads = (LANDMARKS, IN_BASIS, LANDMARKS, IN_BASIS)
    plan, state = gpu_plan(problem, heads, limit=(1e-3, 1e-3, 1e9, 1e9), rows=2), new_state(4)
    ours, exact = through(problem, plan, None, state), exactly(problem, plan)
    assert [torch.equal(ours[:, i], exact[:, i]) for i in range(4)] == [True, True, False, False]
    assert [head.failed_audit for head in head_stats(state)] == [1, 1, 0, 0]
    assert min(head.error for head in head_stats(state)) > 1e-3


def test_values_of_landmarks_that_float16_cannot_hold_are_seen_without_an_audit() -> None:
    problem = bidirectional()
    tensors, _ = random_inputs(problem)
    tensors[2][:, 0] *= 1e4
    narrow = dataclasses.replace(LANDMARKS, scores=HALF.scores, values=HALF.values)
    plan, state = gpu_plan(problem, (narrow, narrow, IN_BASIS, EXACT)), new_state(4)
    assert flags_in(plan, *tensors) == [[1] * 4]
    ours, exact = (
        attention_as_decided(*tensors, [], (), flags_of(problem, flag), to, plan.serialize())
        for flag, to in ((1, state), (0, new_state(4)))
    )
    assert torch.equal(ours[:, 0], exact[:, 0])
    for head in (1, 2):  # what is lost of one says nothing of the others
        assert not torch.equal(ours[:, head], exact[:, head])
    assert ours.isfinite().all()
    assert [head.failed_audit for head in head_stats(state)] == [1, 0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_where_means_or_a_basis_might_spread_it(value: float) -> None:
    problem = problem_named("plain", batch=2, rows=LONGER, columns=LONGER)
    plan = gpu_plan(problem, (EXACT, LANDMARKS, IN_BASIS, IN_BASIS))
    tensors, _ = random_inputs(problem)
    for place, flags in enumerate(([1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1])):
        kept = tensors[place].clone()
        tensors[place][1, :, 1, 3] = value  # no statistic has this row
        assert flags_in(plan, *tensors) == [[1] * 4, flags]
        tensors[place].copy_(kept)


def test_what_float16_cannot_hold_in_the_basis_is_exact() -> None:
    problem = bidirectional(dtype=torch.float16)
    plan = gpu_plan(problem, (EXACT, LANDMARKS, IN_BASIS, IN_BASIS))
    q, k, v = random_inputs(problem)[0]
    k[0, 2, 1] = 4e4  # in some directions four times that
    assert flags_in(plan, q, k, v) == [[1, 1, 0, 1]]


# -- what each call hands on -----------------------------------------------------------------------


def test_bases_are_handed_on_once() -> None:
    problem = problem_named("gqa")
    heads = (IN_BASIS, NEAR_IN_BASIS, EXACT, HeadDecision(basis=basis(8, 2)))
    plan = gpu_plan(problem, heads).serialize()
    (q, _, _), _ = random_inputs(problem)
    bases = bases_of(plan, True)
    assert bases.count(basis().matrix) == 1
    of_heads, of_keys = decided_bases(q, bases)
    each = torch.stack([basis().tensor(), basis(8, 2).tensor()])
    assert torch.equal(of_keys, each)
    assert torch.equal(of_heads, each[[0, 0, 1, 1]] * torch.tensor([1, 1, 0, 1])[:, None, None])
    torch.library.opcheck(torch.ops.adaattn.decided_bases, (q, bases))
    for text in (numbers_of(plan, True), without_bases(plan)):
        assert basis().matrix not in text
    assert without_bases(gpu_plan(problem, (WINDOW,) * 4).serialize()).count("window") == 4


def test_heads_that_share_keys_cannot_have_two_bases() -> None:
    problem = problem_named("gqa")
    heads = (IN_BASIS, HeadDecision(basis=basis(8, 1)), EXACT, EXACT)
    with pytest.raises(ValueError, match="several bases of rank 8"):
        through(problem, gpu_plan(problem, heads))


@pytest.mark.parametrize(
    ("name", "head", "why"),
    [
        ("causal", LANDMARKS, "without a mask"),
        ("sink", LANDMARKS, "without a mask"),
        ("dense bias", LANDMARKS, "without a mask"),
        ("plain", dataclasses.replace(LANDMARKS, skip=8.0), "skips blocks beside means"),
        ("causal", HeadDecision(basis=basis(16)), "less than that"),
        ("padding", NEAR_IN_BASIS, "depends on the input"),
        ("alibi", HeadDecision(pooling=Pooling(Pattern(0), 16)), "of the product alone"),
    ],
)
def test_near_misses_are_refused(name: str, head: HeadDecision, why: str) -> None:
    problem = problem_named(name)
    assert why in (decision_refusal(problem, (head,) * 4, TARGETS["H100"]) or "")


def test_what_goes_is_not_refused() -> None:
    for name, head in (("padding", IN_BASIS), ("alibi", NEAR_IN_BASIS), ("plain", LANDMARKS)):
        problem = problem_named(name, torch.float16)
        assert decision_refusal(problem, (head,) * 4, TARGETS["H100"]) is None
    shared = (IN_BASIS, HeadDecision(basis=basis(8, 1)), EXACT, EXACT)
    refused = decision_refusal(problem_named("gqa"), shared, TARGETS["H100"])
    assert refused == "heads that share keys must share their basis"
