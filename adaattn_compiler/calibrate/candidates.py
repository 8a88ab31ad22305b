"""Which decisions calibration tries for the heads of a site."""

from __future__ import annotations

import itertools

import torch

from adaattn_compiler.decision import (
    EXACT,
    HeadDecision,
    KeyBasis,
    Nystrom,
    Pattern,
    Pooling,
    Precision,
    Selection,
)
from adaattn_compiler.kernels.decided_kernel import decision_refusal
from adaattn_compiler.kernels.problem import Problem

_WINDOWS = (64, 128, 256, 512, 1024, 2048, 4096)
_SINKS = (0, 64)
# A window that leaves out less than this share of the keys is not worth trying.
_LEAST_LEFT_OUT = 0.3
_SKIPS = (4.0, 6.0, 9.0)
# Windows in which blocks are skipped, too: shorter ones have few. With first keys, which cost next
# to nothing where they can be skipped.
_LEAST_SKIPPED, _SKIPS_IN_WINDOWS = 256, (6.0, 9.0)
_MASSES = (0.9, 0.97)
# Keys by their means: the windows in which none is, how many share a mean; landmarks, and how many
# keys each is for at least.
_NEAR, _POOLED = (128, 512), (16, 64)
_LANDMARKS, _LEAST_RUN = (64, 256), 4
_LEAST_RANK = 16
_BOTH = (Precision.BF16, Precision.BF16)
_STAGES = (
    (Precision.FP32, Precision.FP32),
    (Precision.BF16, Precision.FP32),
    (Precision.FP32, Precision.BF16),
    _BOTH,
)


def candidates_for(problem: Problem) -> tuple[HeadDecision, ...]:
    """Decisions for a head of a problem, the exact one first; each once."""
    # Of few bits already: nothing is rounded further.
    stages = _STAGES if problem.dtype == torch.float32 else _STAGES[:1]
    found = [HeadDecision(scores=s, values=v) for s, v in stages]
    best = stages[-1]
    found += [HeadDecision(scores=best[0], values=best[1], skip=skip) for skip in _SKIPS]
    found += [
        HeadDecision(selection=Selection(mass, by), scores=best[0], values=best[1])
        for mass, by in itertools.product(_MASSES, ("pooled", "antidiagonal"))
    ]
    # In an order that is the same in every process, as a set's is not.
    ends = dict.fromkeys((stages[0], best))
    for pattern, (scores, values) in itertools.product(_patterns(problem), ends):
        found.append(HeadDecision(pattern=pattern, scores=scores, values=values))
    found += [
        HeadDecision(pattern=pattern, scores=best[0], values=best[1], skip=skip)
        for pattern, skip in itertools.product(_patterns(problem), _SKIPS_IN_WINDOWS)
        if pattern.window >= _LEAST_SKIPPED and pattern.sinks
    ]
    found += [
        HeadDecision(
            pooling=Pooling(Pattern(window, _SINKS[-1]), keys), scores=best[0], values=best[1]
        )
        for window, keys in itertools.product(_NEAR, _POOLED)
        if window <= _longest_window(problem)
    ]
    found += [
        HeadDecision(nystrom=Nystrom(count), scores=best[0], values=best[1])
        for count in _LANDMARKS
        if count <= problem.shape.hints[2] // _LEAST_RUN
    ]
    found += [
        HeadDecision(basis=standing_basis(problem.shape.head_dim, rank), scores=s, values=v)
        for rank in _ranks(problem)
        for s, v in (best,)
    ]
    found = [decision for decision in found if decision_refusal(problem, (decision,)) is None]
    return tuple(dict.fromkeys((EXACT, *found)))


def standing_basis(dim: int, rank: int) -> KeyBasis:
    """What stands among candidates for the basis of each key head, which its keys give."""
    return KeyBasis.of(torch.eye(dim)[:, :rank])


def _ranks(problem: Problem) -> tuple[int, ...]:
    """Half of the dimensions, where that is worth it."""
    half = problem.shape.head_dim // 2
    return (half,) if half % 8 == 0 and half >= _LEAST_RANK else ()


def _patterns(problem: Problem) -> list[Pattern]:
    windows = [w for w in _WINDOWS if w <= _longest_window(problem)]
    return [Pattern(window, sinks) for window in windows for sinks in _SINKS]


def _longest_window(problem: Problem) -> float:
    """In keys, of those that are worth trying."""
    return (1 - _LEAST_LEFT_OUT) * problem.shape.hints[2]
