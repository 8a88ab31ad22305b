"""What a choice takes, measured as it will run: all heads of a site in one call."""

from __future__ import annotations

import torch

from adaattn_compiler.calibrate.apply import Decisions
from adaattn_compiler.calibrate.board import Tensors, exactly
from adaattn_compiler.calibrate.measure import decided, unguarded
from adaattn_compiler.calibrate.times import least_seconds
from adaattn_compiler.decision import EXACT
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.passes.choices import SiteKey


class Timing:
    """The handler that times each site once, exactly and as decided, and answers exactly.

    seconds: (exact, decided) by site; without guards.
    """

    def __init__(self, decisions: Decisions) -> None:
        self.seconds: dict[SiteKey, tuple[float, float]] = {}
        self._decisions = decisions

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        heads = self._decisions.get(key, ())
        if key not in self.seconds and any(head != EXACT for head in heads):
            runner = unguarded(problem, heads)
            exact, chosen = least_seconds(
                [lambda: exactly(key, problem, tensors), lambda: decided(runner, tensors)]
            )
            self.seconds[key] = exact, chosen
        return exactly(key, problem, tensors)
