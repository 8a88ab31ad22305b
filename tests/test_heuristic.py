"""The seed heuristic: each of its thresholds on both sides, and what its proposals stand for."""

from __future__ import annotations

import math

import pytest
import torch

from adaattn_compiler.decision import BLOCK, EXACT, HeadDecision, Pattern, Pooling, Precision
from adaattn_compiler.kernels.effective_rank import select_rank
from adaattn_compiler.kernels.heuristic import (
    nearest,
    ranks_of,
    seed_candidates,
    seed_decision,
    seed_decisions,
    seed_format,
)
from adaattn_compiler.kernels.statistics import head_statistics
from adaattn_compiler.spec import AttentionSpec

BF16 = HeadDecision(scores=Precision.BF16, values=Precision.BF16)
NEAR = Pattern(BLOCK, BLOCK)


def pooled(keys: int, precision: Precision = Precision.BF16) -> HeadDecision:
    return HeadDecision(pooling=Pooling(NEAR, keys), scores=precision, values=precision)


@pytest.mark.parametrize(
    ("largest", "smallest", "entropy", "wanted"),
    [
        (1.0001e4, 1.0, 2.0, "fp32"),  # range above 1e4
        (1e4, 1.0, 2.0, "bf16"),
        (1.0001e3, 1.0, 2.0, "bf16"),  # range above 1e3
        (1e3, 1.0, 2.0, "fp16"),
        (1e3, 1.0, 0.999, "bf16"),  # entropy below 1.0
        (1e3, 1.0, 1.0, "fp16"),
        (65503.0, 100.0, 2.0, "fp16"),  # the largest of fp16
        (65504.0, 100.0, 2.0, "fp8"),
        (6.1e-3, 6.1e-5, 2.0, "fp16"),  # its smallest
        (6.0e-3, 6.0e-5, 2.0, "fp8"),
        (1.0, 0.0, 2.0, "fp32"),
        (0.0, 0.0, 2.0, "fp32"),
        (math.nan, 1.0, 2.0, "fp32"),
        (math.inf, 1.0, 2.0, "fp32"),
    ],
)
def test_each_threshold_of_precision_on_both_sides(
    largest: float, smallest: float, entropy: float, wanted: str
) -> None:
    assert seed_format(largest, smallest, entropy) == wanted


@pytest.mark.parametrize(("rank", "keys"), [(0, 64), (16, 64), (17, 32), (128, 8), (511, 8)])
def test_below_half_the_keys_a_rank_is_low(rank: int, keys: int) -> None:
    wanted = pooled(keys, Precision.FP32)
    assert seed_decision(2e4, 1.0, 2.0, rank, 1024) == wanted


@pytest.mark.parametrize("rank", [512, 1024])
def test_from_half_the_keys_on_a_rank_is_not_low(rank: int) -> None:
    assert seed_decision(2e4, 1.0, 2.0, rank, 1024) == EXACT
    assert seed_decision(2e3, 1.0, 2.0, rank, 1024) == BF16


def test_fp8_is_said_as_fp16_as_there_is_none() -> None:
    assert seed_decision(7e4, 1e3, 2.0, 1024, 1024).scores is Precision.FP16


def test_a_proposal_stands_for_what_is_there_and_as_precise() -> None:
    candidates = seed_candidates((Precision.BF16, Precision.FP32))
    fp16 = HeadDecision(scores=Precision.FP16, values=Precision.FP16)
    assert candidates[nearest(BF16, candidates)] == BF16
    assert candidates[nearest(fp16, candidates)] == BF16
    assert candidates[nearest(pooled(16), candidates)] == pooled(16)
    assert candidates[nearest(pooled(16, Precision.FP16), candidates)] == pooled(16)
    # Fewer keys to a mean are more precise; without any means, all keys are.
    assert nearest(pooled(32), [pooled(64), pooled(16), BF16]) == 1
    assert nearest(pooled(32), [pooled(64), BF16]) == 1
    assert nearest(pooled(32, Precision.FP32), [pooled(32), BF16]) == -1
    assert nearest(EXACT, [pooled(32), BF16]) == -1
    assert nearest(BF16, []) == -1


def _qk(rows: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The first head attends to itself alone, the second to all alike."""
    q = torch.randn(1, 2, rows, 64)
    q[:, 1] *= noise
    k = q.clone()
    k[:, 0] *= 8
    return q, k


def test_ranks_tell_heads_apart() -> None:
    q, k = _qk(128, 1e-3)
    spec = AttentionSpec(0.125)
    found = ranks_of(q, k, spec)
    torch.testing.assert_close(found, select_rank(q, k))
    assert found[0, 0] >= 64
    assert found[0, 1] == 1


def test_ranks_above_what_is_counted_are_not_low() -> None:
    """An attention of 160 ranks of 480 keys: below half, but more than are looked for."""
    centers = torch.eye(160).repeat_interleave(3, 0)
    q = 30 * centers[torch.randperm(480)][None, None]
    found = ranks_of(q, 30 * centers[None, None], AttentionSpec(1.0))
    assert found.tolist() == [[480]]
    few = torch.eye(16).repeat(32, 1)[None, None]
    assert ranks_of(30 * few, 30 * few, AttentionSpec(1.0)).tolist() == [[16]]


def test_heads_are_proposed_for_by_their_statistics() -> None:
    q, k = _qk(128, 1e-3)
    spec = AttentionSpec(0.125)
    statistics = head_statistics(q, k, k, (), (), spec)
    wide, narrow = seed_decisions(statistics, ranks_of(q, k, spec), 128)
    assert wide.pooling is None
    assert narrow.pooling == Pooling(NEAR, 64)


def test_of_a_batch_the_item_that_asks_for_most_counts() -> None:
    q = torch.randn(2, 1, 128, 64)
    k = q.clone()
    q[1] *= 1e-3
    spec = AttentionSpec(1.0)
    statistics = head_statistics(q, k, k, (), (), spec)
    ranks = torch.tensor([[100], [1]])
    (both,) = seed_decisions(statistics, ranks, 128)
    assert both.pooling is None
    assert both.scores is Precision.FP32  # scores of both lie further apart than those of one
    (one,) = seed_decisions(head_statistics(q[1:], k[1:], k[1:], (), (), spec), ranks[1:], 128)
    assert one.pooling is not None
    assert one.scores is not Precision.FP32
