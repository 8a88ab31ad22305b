"""What a choice takes, measured as it will run: all heads of a site in one call.

Candidates are timed with all heads alike, and a busy machine disturbs that. What counts is this:
where a site is not faster as decided, it stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adaattn_compiler.calibrate.apply import Decisions
from adaattn_compiler.calibrate.board import Tensors, exactly
from adaattn_compiler.calibrate.measure import decided, unguarded
from adaattn_compiler.calibrate.select import Selection
from adaattn_compiler.decision import EXACT
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.timing import least_seconds
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


def only_faster(selection: Selection, timed: Mapping[SiteKey, tuple[float, float]]) -> Selection:
    """The selection with those sites exact that take no less time as decided; timed: (exact,
    decided) seconds of the others than exact ones."""
    slower = _slower(timed)
    return {key: (0,) * len(own) if key in slower else own for key, own in selection.items()}


def in_words(timed: Mapping[SiteKey, tuple[float, float]]) -> str:
    """Of the sites that `only_faster` leaves exact; "" where there are none."""
    slower = [
        f"{key.name or '(root)'} ({ratio:.2f} times as long)"
        for key, ratio in _slower(timed).items()
    ]
    if not slower:
        return ""
    return (
        f"exact after all, as they took longer as decided: {', '.join(slower)}. Calls of so few "
        "tokens gain nothing, or the machine was busy: calibrate anew while nothing else runs"
    )


def _slower(timed: Mapping[SiteKey, tuple[float, float]]) -> dict[SiteKey, float]:
    """Of the sites that are no faster as decided, how many times as long they take."""
    return {key: chosen / exact for key, (exact, chosen) in timed.items() if chosen >= exact}
