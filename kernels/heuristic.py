"""The threshold rules of this project's first description, to compare with (`heuristic="seed"`).

Not recommended: they look at an attention's rank and range of scores, not at the error of its
output. What they propose is held to the budget by measurement, like all else.

Rules, as docs/requirements.md has them:
- Representation (rows R3, R4): low rank where the effective rank at energy 0.95 is below half the
  keys, else dense. Of the normalized squares: as first written the rule answers 0 (`literal_rank`).
- Precision (rows P1, P3), the first that holds, with the range largest / smallest of |score|:
  range above 1e4: FP32; range above 1e3, or entropy below 1.0 nats: BF16; all magnitudes within
  what FP16 has (65504, 6e-5): FP16; else FP8.

What is not literal:
- The smallest non-zero magnitude tends to 0 as keys grow, and every head would be FP32: the 1%
  quantile of magnitudes stands for it (statistics.py).
- The rows name the entropy's threshold, not its side. Few effective keys are taken to need the
  wider type.
- Ranks are counted up to 128, as more take minutes; what has more is dense.
- There is no FP8 yet: FP16 is said in its place. The chain is FP32, BF16, FP16, FP8, so that where
  a kernel has no FP16 (none on the CPU has) BF16 is taken: wider in range, of fewer bits.
- Low rank is keys through the means of neighbours (`Pooling`), as many means as ranks; dense where
  no kernel has that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from adaattn_compiler.decision import (
    BLOCK,
    HeadDecision,
    Pattern,
    Pooling,
    Precision,
    Representation,
)
from adaattn_compiler.kernels.effective_rank import attention_spectrum, chosen_representation
from adaattn_compiler.kernels.statistics import HeadStatistics
from adaattn_compiler.spec import AttentionSpec

HEURISTICS = ("seed",)

ENERGY = 0.95
WIDE_RANGE, MIDDLE_RANGE = 1e4, 1e3
LOW_ENTROPY = 1.0
LARGEST_FP16, SMALLEST_FP16 = 65504.0, 6e-5

# The formats of the description, and what is taken for each.
_TAKEN = {
    "fp32": Precision.FP32,
    "bf16": Precision.BF16,
    "fp16": Precision.FP16,
    "fp8": Precision.FP16,
}
# From the most precise on, in the order of the description.
_CHAIN = (Precision.FP32, Precision.TF32, Precision.BF16, Precision.FP16)
# Neighbouring keys that one mean may stand for; what is near is met key by key.
_POOLED = (64, 32, 16, 8)
_NEAR = Pattern(BLOCK, BLOCK)
_FIRST_RANK, _MOST_RANKS = 32, 128


def seed_format(largest: float, smallest: float, entropy: float) -> str:
    """ "fp32", "bf16", "fp16" or "fp8", for |score| from smallest to largest, and nats of a row."""
    span = largest / smallest if smallest > 0 else float("inf")
    if not span <= WIDE_RANGE:
        return "fp32"
    if span > MIDDLE_RANGE or entropy < LOW_ENTROPY:
        return "bf16"
    return "fp16" if largest < LARGEST_FP16 and smallest > SMALLEST_FP16 else "fp8"


def seed_decision(
    largest: float, smallest: float, entropy: float, rank: int, columns: int
) -> HeadDecision:
    """Of a head; rank: at energy ENERGY, of so many keys."""
    precision = _TAKEN[seed_format(largest, smallest, entropy)]
    pooling = None
    if chosen_representation(rank, columns) is Representation.LOW_RANK:
        share = columns / max(rank, 1)
        pooling = Pooling(_NEAR, next((keys for keys in _POOLED if keys <= share), _POOLED[-1]))
    return HeadDecision(pooling=pooling, scores=precision, values=precision)


def seed_decisions(
    statistics: HeadStatistics, ranks: torch.Tensor, columns: int
) -> tuple[HeadDecision, ...]:
    """Of each head; ranks: [B,H]. Of a batch, what asks for the most counts."""
    heads = zip(
        statistics.score_max.amax(0).tolist(),
        statistics.score_quantiles[..., 0].exp2().amin(0).tolist(),
        statistics.entropy.amin(0).tolist(),
        ranks.amax(0).tolist(),
        strict=True,
    )
    return tuple(seed_decision(*head, columns) for head in heads)


def ranks_of(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    spec: AttentionSpec,
    operands: Sequence[torch.Tensor] = (),
    params: Sequence[int] = (),
) -> torch.Tensor:
    """int64 [B,H]: the effective rank of each head at ENERGY; min(M, N) where it is above half of
    that, or above 128. Costs many times the attention."""
    half = max(min(q_BHMD.shape[2], k_BGND.shape[2]) // 2, 1)
    most = min(half, _MOST_RANKS)
    rank = min(_FIRST_RANK, most)
    while True:
        found = attention_spectrum(q_BHMD, k_BGND, spec, operands, params, rank=rank)
        ranks = found.effective_rank(ENERGY)
        if rank == most or bool((ranks <= rank).all()):
            return ranks
        rank = min(4 * rank, most)


def seed_candidates(stages: Sequence[Precision]) -> list[HeadDecision]:
    """All that may be proposed where kernels have these precisions."""
    kinds = (*(Pooling(_NEAR, keys) for keys in _POOLED), None)
    return [
        HeadDecision(pooling=pooling, scores=stage, values=stage)
        for pooling in kinds
        for stage in stages
    ]


def nearest(wanted: HeadDecision, candidates: Sequence[HeadDecision]) -> int:
    """The number of the candidate that a proposal stands for: itself, or what is more precise and
    nearest to it (what is met key by key beside means makes no difference); -1 for exact."""
    stages = list(reversed(_CHAIN[: _CHAIN.index(wanted.scores) + 1]))
    pooled: list[int | None] = [None]
    if wanted.pooling is not None:
        pooled = [*(keys for keys in _POOLED if keys <= wanted.pooling.keys), None]
    for keys, stage in itertools.product(pooled, stages):
        for number, candidate in enumerate(candidates):
            if _is(candidate, keys, stage):
                return number
    return -1


def _is(candidate: HeadDecision, keys: int | None, stage: Precision) -> bool:
    """Whether a decision is this precision and this many keys to a mean, and nothing else."""
    pooling = candidate.pooling
    found = None if pooling is None else pooling.keys
    return found == keys and candidate == HeadDecision(pooling=pooling, scores=stage, values=stage)
