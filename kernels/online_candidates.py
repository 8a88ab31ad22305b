"""Which decisions a site tries that decides for itself: fewer than calibration does, as each costs
calls of the user's."""

from __future__ import annotations

import itertools

import torch

from adaattn_compiler.decision import (
    BLOCK,
    EXACT,
    HeadDecision,
    Nystrom,
    Pattern,
    Pooling,
    Precision,
    Selection,
)
from adaattn_compiler.kernels.decided_kernel import decision_refusal
from adaattn_compiler.kernels.heuristic import seed_candidates
from adaattn_compiler.kernels.problem import Problem

_WINDOWS = (64, 256, 1024, 4096)
# A window that leaves out less than this share of the keys is not worth trying.
_LEAST_LEFT_OUT = 0.3
_MASS, _SKIP, _POOLED, _LANDMARKS = 0.95, 9.0, 16, 64


def online_candidates(problem: Problem, heuristic: str | None = None) -> tuple[HeadDecision, ...]:
    """Decisions for a head of a problem that its kernels can take, beside exact; each once.

    heuristic: only what it may propose.
    """
    stages: tuple[Precision, ...] = (Precision.FP32,)
    if problem.dtype == torch.float32:  # else of few bits already: nothing is rounded further
        stages = (Precision.BF16, *stages)
    found = seed_candidates(stages) if heuristic is not None else _tried(problem, stages)
    able = [d for d in found if d != EXACT and decision_refusal(problem, (d,)) is None]
    return tuple(dict.fromkeys(able))


def _tried(problem: Problem, stages: tuple[Precision, ...]) -> list[HeadDecision]:
    """The fewest keys first: of equal times, that is what is taken."""
    columns, few = problem.shape.hints[2], stages[0]
    windows = [w for w in _WINDOWS if w <= (1 - _LEAST_LEFT_OUT) * columns]
    return [
        *(
            HeadDecision(pattern=Pattern(window, BLOCK), scores=stage, values=stage)
            for window, stage in itertools.product(windows, stages)
        ),
        HeadDecision(pooling=Pooling(Pattern(BLOCK, BLOCK), _POOLED), scores=few, values=few),
        HeadDecision(nystrom=Nystrom(_LANDMARKS), scores=few, values=few),
        HeadDecision(selection=Selection(_MASS), scores=few, values=few),
        HeadDecision(scores=few, values=few, skip=_SKIP),
        HeadDecision(scores=few, values=few),
    ]
