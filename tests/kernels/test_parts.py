"""Heads by means of keys, by landmarks and in a basis of keys, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decided_plans import BF16, flags_of, plan_for
from specs import SPECS, problem_of, random_inputs

from adaattn_compiler.decision import (
    EXACT,
    HeadDecision,
    KeyBasis,
    Nystrom,
    Pattern,
    Pooling,
    Representation,
)
from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.cpu.decided import DecidedRunner
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.decided_kernel import decision_refusal
from adaattn_compiler.kernels.low_rank import pooling_refusal
from adaattn_compiler.kernels.nystrom import pseudo_inverse
from adaattn_compiler.kernels.patterns import kept_blocks, sees_itself
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import (
    lowrank_attention,
    nystrom_attention,
    reference_attention,
)
from adaattn_compiler.runtime.state import head_stats, new_state

ROWS = 330  # a ragged block at the end
BY_16, BY_64 = (HeadDecision(pooling=Pooling(Pattern(0, 64), keys)) for keys in (16, 64))
NEAR = HeadDecision(pooling=Pooling(Pattern(64), 8))
POOLED = (BY_16, EXACT, BY_64, NEAR)
Tensors = list[torch.Tensor]


def basis(rank: int, seed: int = 0) -> KeyBasis:
    generator = torch.Generator().manual_seed(seed)
    full, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    return KeyBasis.of(full[:, :rank])


def result(problem: Problem, heads: tuple[HeadDecision, ...], rows: int = 0) -> torch.Tensor:
    tensors, operands = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem, heads, rows=rows))
    return runner(*tensors, operands, problem.param_hints, flags_of(problem), new_state(4))


def pooled(tensors: Tensors, keys: int) -> Tensors:
    """Centroids of blocks of 64 keys as `lowrank_attention` takes them, of the whole ones."""
    _, k, v = tensors
    blocks, each = k.shape[2] // 64, 64 // keys
    means = [t[:, :, : blocks * 64].unflatten(2, (blocks, each, keys)).mean(4) for t in (k, v)]
    count = torch.full((*k.shape[:2], blocks, each), float(keys), dtype=k.dtype)
    return [*means, count.log()]


def by_head(problem: Problem, heads: tuple[HeadDecision, ...], dtype: torch.dtype) -> torch.Tensor:
    given, operands = random_inputs(problem)
    tensors = [tensor.to(dtype) for tensor in given]
    params, spec = problem.param_hints, problem.spec
    extra = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    rows, columns = tensors[0].shape[2], tensors[1].shape[2]
    structure = block_structure(spec.mask, rows, columns, 64, 64, params)
    exact = reference_attention(*tensors, extra, params, spec)
    out = []
    for i, head in enumerate(heads):
        if head.pooling is None or not sees_itself(spec.mask, rows, columns, params):
            out.append(exact[:, i])
            continue
        far = structure.full & ~kept_blocks(head, rows, columns)
        far = far[:, : columns // 64]
        near = ~torch.nn.functional.pad(far, (0, structure.full.shape[1] - far.shape[1]))
        near, far = (seen.repeat_interleave(64, 0)[:rows] for seen in (near, far))
        near = near.repeat_interleave(64, 1)[:, :columns]
        means = pooled(tensors, head.pooling.keys)
        out.append(lowrank_attention(tensors, means, extra, params, spec, near, far)[:, i])
    return torch.stack(out, 1)


def assert_as_accurate(out: torch.Tensor, true: torch.Tensor, eager: torch.Tensor) -> None:
    assert torch.equal(out.isnan(), true.isnan())
    wrong, allowed = (out - true).nan_to_num().abs().max(), (eager - true).nan_to_num().abs().max()
    assert wrong <= 2 * allowed + 1e-6


CAN_BE_POOLED = sorted(
    name
    for name, (spec, shapes, _) in SPECS.items()
    if pooling_refusal(spec) is None and not spec.masks_by_data and (2, 90) not in shapes
)


@pytest.mark.parametrize("name", CAN_BE_POOLED)
def test_far_keys_are_met_by_their_means(name: str) -> None:
    problem = problem_of(name, rows=ROWS, columns=ROWS)
    out = result(problem, POOLED)
    true, eager = (by_head(problem, POOLED, t) for t in (torch.float64, torch.float32))
    assert_as_accurate(out, true, eager)
    if name == "causal":  # what the test is about
        exact = by_head(problem, (EXACT,) * 4, torch.float64)
        assert [(true - exact)[:, i].abs().max().item() > 1e-2 for i in range(4)] == [
            head is not EXACT for head in POOLED
        ]


@pytest.mark.parametrize("rows", [1, 8, 64, 200])
def test_last_rows_of_more_keys(rows: int) -> None:
    problem = problem_of("last rows", rows=rows, columns=ROWS)
    out = result(problem, POOLED)
    heads = POOLED if rows > 8 else (EXACT,) * 4
    true, eager = (by_head(problem, heads, t) for t in (torch.float64, torch.float32))
    assert_as_accurate(out, true, eager)


def test_in_bfloat16_too() -> None:
    problem = problem_of("gqa", rows=ROWS, columns=ROWS)
    heads = tuple(dataclasses.replace(BF16, pooling=head.pooling) for head in POOLED)
    out, true = result(problem, heads), by_head(problem, heads, torch.float64)
    errors = ((out - true).square().sum((0, 2, 3)) / true.square().sum((0, 2, 3))).sqrt()
    assert bool((errors < 0.02).all())
    narrow = dataclasses.replace(problem, dtype=torch.bfloat16)
    out = result(narrow, POOLED)
    true, eager = by_head(narrow, POOLED, torch.float64), by_head(narrow, POOLED, torch.bfloat16)
    assert (out - true).abs().max() <= 2 * (eager - true).abs().max()


def test_what_comes_later_changes_nothing_before() -> None:
    problem = problem_of("causal", rows=ROWS, columns=ROWS)
    (q, k, v), _ = random_inputs(problem)
    runner = DecidedRunner(plan_for(problem, (*POOLED[:1], BY_64, NEAR, BY_16), rows=0))
    flags = flags_of(problem)
    before = runner(q, k, v, [], (), flags, new_state(4))
    for place in (64, 130, 255, 320):
        later = [t.clone() for t in (q, k, v)]
        for tensor in later:
            tensor[:, :, place:] += 3.0
        after = runner(*later, [], (), flags, new_state(4))
        assert torch.equal(after[:, :, :place], before[:, :, :place])
        assert not torch.equal(after[:, :, place:], before[:, :, place:])


@pytest.mark.parametrize(("rows", "columns"), [(330, 330), (200, 330)])
def test_landmarks(rows: int, columns: int) -> None:
    problem = problem_of("plain", rows=rows, columns=columns)
    heads = (HeadDecision(nystrom=Nystrom(16)), EXACT, HeadDecision(nystrom=Nystrom(64)), EXACT)
    out = result(problem, heads)

    def each(dtype: torch.dtype) -> torch.Tensor:
        given, _ = random_inputs(problem)
        qkv = [tensor.to(dtype) for tensor in given]
        exact = reference_attention(*qkv, (), (), problem.spec)
        ways = (16, None, 64, None)
        parts = [
            exact if n is None else nystrom_attention(qkv, n, problem.spec.scale) for n in ways
        ]
        return torch.stack([part[:, i] for i, part in enumerate(parts)], 1)

    true, eager = each(torch.float64), each(torch.float32)
    for i in range(4):
        wrong, allowed = (out - true)[:, i].abs().max(), (eager - true)[:, i].abs().max()
        assert wrong <= 4 * allowed + 1e-6


def test_landmarks_are_good_where_rows_and_keys_come_in_kinds() -> None:
    """Runs of 30 rows and keys that are alike: as many landmarks are all there is."""
    problem = problem_of("plain", rows=480, columns=480)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(3))
    q, k = (tensor.repeat_interleave(30, 2) for tensor in (q, k))
    v = torch.randn(2, 4, 480, 16, generator=generator)
    runner = DecidedRunner(plan_for(problem, (HeadDecision(nystrom=Nystrom(16)),) * 4, rows=0))
    out = runner(q, k, v, [], (), flags_of(problem), new_state(4))
    true = reference_attention(*(t.double() for t in (q, k, v)), (), (), problem.spec)
    assert (out - true).norm() < 1e-3 * true.norm()


def test_the_pseudo_inverse() -> None:
    weights = torch.eye(12, dtype=torch.float64) * 0.6 + 0.4 / 12
    assert (pseudo_inverse(weights) - torch.linalg.pinv(weights)).abs().max() < 1e-8
    alike = torch.full((3, 12, 12), 1 / 12, dtype=torch.float64)
    assert (pseudo_inverse(alike) - torch.linalg.pinv(alike)).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["causal", "gqa", "alibi", "sink", "softcap", "plain"])
def test_scores_in_a_basis_of_keys(name: str) -> None:
    problem = problem_of(name, rows=ROWS, columns=ROWS)
    shared = basis(8)
    heads = (
        HeadDecision(basis=shared),
        HeadDecision(basis=shared, pattern=Pattern(64)),
        HeadDecision(basis=basis(16 - 8, 3)) if problem.spec.group == 1 else EXACT,
        EXACT,
    )
    out = result(problem, heads)

    def each(dtype: torch.dtype) -> torch.Tensor:
        given, operands = random_inputs(problem)
        q, k, v = (tensor.to(dtype) for tensor in given)
        found = []
        for i, head in enumerate(heads):
            turn = torch.eye(16, dtype=dtype)
            if head.basis is not None:
                turn = head.basis.tensor().to(dtype)
            base = reference_attention(q @ turn, k @ turn, v, operands, (), problem.spec)
            found.append(base[:, i])
        return torch.stack(found, 1)

    true, eager = each(torch.float64), each(torch.float32)
    for i in (0, 2, 3):
        wrong, allowed = (out - true)[:, i].abs().max(), (eager - true)[:, i].abs().max()
        assert wrong <= 2 * allowed + 1e-6
    if name != "plain":  # the window keeps all that the first rows see
        assert (out - true)[:, 1, :64].abs().max() <= 2 * (eager - true).abs().max() + 1e-6


def test_a_basis_of_all_directions_of_the_keys_loses_nothing() -> None:
    problem = problem_of("causal", rows=ROWS, columns=ROWS)
    (q, k, v), _ = random_inputs(problem)
    turn = basis(8).tensor()
    k = k @ turn @ turn.T
    runner = DecidedRunner(plan_for(problem, (HeadDecision(basis=basis(8)),) * 4, rows=0))
    out = runner(q, k, v, [], (), flags_of(problem), new_state(4))
    true = reference_attention(*(t.double() for t in (q, k, v)), (), (), problem.spec)
    assert (out - true).abs().max() < 1e-5


def test_audits_see_parts_and_heads_that_are_off_are_exact() -> None:
    problem = problem_of("causal", rows=ROWS, columns=ROWS)
    tensors, operands = random_inputs(problem)
    heads = (BY_16, EXACT, HeadDecision(basis=basis(8)), HeadDecision(pattern=Pattern(0)))
    runner = DecidedRunner(plan_for(problem, heads, limit=(1e-3, 1e-3, 1e-3, 10.0), rows=8))
    state = new_state(4)
    out = runner(*tensors, operands, (), flags_of(problem), state)
    exact = cpp_runner(plan_of(problem))(*tensors, operands, ())
    assert torch.equal(out[:, :3], exact[:, :3])
    assert not torch.equal(out[:, 3], exact[:, 3])
    assert [head.failed_audit for head in head_stats(state)] == [2, 0, 2, 0]


def test_what_is_not_finite_is_exact() -> None:
    problem = problem_of("causal", rows=ROWS, columns=ROWS)
    (q, k, v), _ = random_inputs(problem)
    k[0, 0, 5, 3] = float("inf")
    v[1, 2, 200, 3] = float("nan")
    runner = DecidedRunner(plan_for(problem, POOLED))
    out = runner(q, k, v, [], (), flags_of(problem), new_state(4))
    exact = cpp_runner(plan_of(problem))(q, k, v, [], ())
    assert torch.equal(out.nan_to_num(), exact.nan_to_num())
    assert torch.equal(out.isnan(), exact.isnan())


def test_plans_carry_them() -> None:
    heads = (BY_16, HeadDecision(nystrom=Nystrom(32)), HeadDecision(basis=basis(8)), EXACT)
    plan = plan_for(problem_of("plain"), heads)
    assert DecidedPlan.deserialize(plan.serialize()) == plan
    assert [head.representation for head in heads[:3]] == [Representation.LOW_RANK] * 3


@pytest.mark.parametrize(
    ("name", "heads", "why"),
    [
        ("alibi", (BY_16,), "of the product alone"),
        ("dense bias", (BY_64,), "of the product alone"),
        ("causal", (HeadDecision(nystrom=Nystrom(16)),), "without a mask"),
        ("sink", (HeadDecision(nystrom=Nystrom(16)),), "without a mask"),
        ("causal", (HeadDecision(basis=basis(16)),), "less than that"),
        ("gqa", tuple(HeadDecision(basis=basis(8, i)) for i in range(4)), "share their basis"),
        ("padding", (BY_16,), "depends on the input"),
    ],
)
def test_near_misses_are_refused(name: str, heads: tuple[HeadDecision, ...], why: str) -> None:
    assert why in (decision_refusal(problem_of(name), heads) or "")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Nystrom(17),
        lambda: KeyBasis(8, "AAAA"),
        lambda: KeyBasis(7, basis(8).matrix),
        lambda: KeyBasis.of(torch.full((16, 8), float("nan"))),
        lambda: HeadDecision(pooling=BY_16.pooling, basis=basis(8)),
        lambda: HeadDecision(pattern=Pattern(0), nystrom=Nystrom(16)),
    ],
)
def test_what_is_no_decision(wrong: object) -> None:
    with pytest.raises(ValueError, match="it must be"):
        wrong()  # type: ignore[operator]
