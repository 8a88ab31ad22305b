"""Which decisions calibration tries for the heads of a site."""

from __future__ import annotations

import itertools

import torch

from adaattn_compiler.decision import EXACT, HeadDecision, Pattern, Precision, Selection
from adaattn_compiler.kernels.decided_kernel import decision_refusal
from adaattn_compiler.kernels.problem import Problem

_WINDOWS = (64, 128, 256, 512, 1024, 2048, 4096)
_SINKS = (0, 64)
# A window that leaves out less than this share of the keys is not worth trying.
_LEAST_LEFT_OUT = 0.3
_SKIPS = (6.0, 9.0)
_MASSES = (0.9, 0.97)
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
    found = [decision for decision in found if decision_refusal(problem, (decision,)) is None]
    return tuple(dict.fromkeys((EXACT, *found)))


def _patterns(problem: Problem) -> list[Pattern]:
    columns = problem.shape.hints[2]
    windows = [w for w in _WINDOWS if w <= (1 - _LEAST_LEFT_OUT) * columns]
    return [Pattern(window, sinks) for window in windows for sinks in _SINKS]
