"""Plans of decisions that no guard stops, for the problems of specs.py."""

from __future__ import annotations

import dataclasses
import math

import torch

from adaattn_compiler.decision import EXACT, HeadDecision, Pattern, Precision
from adaattn_compiler.kernels.cpu.decided import AS_DECIDED
from adaattn_compiler.kernels.cpu.runner import plan_of
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.envelope import names
from adaattn_compiler.kernels.problem import Problem

WINDOW = HeadDecision(pattern=Pattern(0))
BF16 = HeadDecision(scores=Precision.BF16, values=Precision.BF16)
MIXED = (EXACT, WINDOW, BF16, dataclasses.replace(BF16, pattern=Pattern(0)))


def plan_for(
    problem: Problem, heads: tuple[HeadDecision, ...] = MIXED, **fields: object
) -> DecidedPlan:
    """A plan that no guard stops, but for what `fields` say."""
    open_low = ((-math.inf,) * len(heads),) * len(names())
    open_high = ((math.inf,) * len(heads),) * len(names())
    base = plan_of(problem, mixed=problem.dtype == torch.float32)
    limit = (math.inf,) * len(heads)
    plan = DecidedPlan(base, heads, open_low, open_high, limit, limit, 4)
    return dataclasses.replace(plan, **fields)


def flags_of(problem: Problem, value: int = AS_DECIDED) -> torch.Tensor:
    return torch.full((problem.shape.hints[0], problem.shape.heads), value, dtype=torch.int32)
