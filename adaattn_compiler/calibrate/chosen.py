"""What a choice takes, measured as it will run: all heads of a site in one call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from adaattn_compiler.calibrate.apply import Decisions
from adaattn_compiler.calibrate.board import Tensors, exactly
from adaattn_compiler.calibrate.measure import decided, unguarded
from adaattn_compiler.decision import EXACT
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.passes.choices import SiteKey

_ROUNDS = 4


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
            ways = (
                lambda: exactly(key, problem, tensors),
                lambda: decided(runner, tensors),
            )
            exact, chosen = _least(*ways)
            self.seconds[key] = exact, chosen
        return exactly(key, problem, tensors)


def _least(*ways: Callable[[], torch.Tensor]) -> list[float]:
    """The least seconds of each, in turns; the first makes lists and is not counted."""
    least = [float("inf")] * len(ways)
    for turn in range(_ROUNDS):
        for i, way in enumerate(ways):
            begin = time.perf_counter()
            way()
            if turn:
                least[i] = min(least[i], time.perf_counter() - begin)
    return least
