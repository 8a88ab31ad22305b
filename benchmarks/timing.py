"""Two calls side by side: A B, B A, A B, ...

Machines are shared and clocks move, so times of two runs say little; the ratio within a round, in
which both ran in turn, says much. What is reported is the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# A sample is at least this long: shorter calls are repeated within it.
_LEAST_SAMPLE = 4e-3
_LEAST_ROUNDS, _MOST_ROUNDS = 7, 200


@dataclass(frozen=True)
class Rounds:
    """Seconds of a call in each round: of what is compared with, and of ours."""

    theirs: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(t / o for t, o in zip(self.theirs, self.ours, strict=True))

    @property
    def ratio(self) -> float:
        """Times faster: the median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.ratios), max(self.ratios)

    def __add__(self, other: Rounds) -> Rounds:
        return Rounds(self.theirs + other.theirs, self.ours + other.ours)


def interleaved(
    theirs: Callable[[], object], ours: Callable[[], object], seconds: float, smoke: bool = False
) -> Rounds:
    """Rounds for about that many seconds, both called before the first."""
    calls = (theirs, ours)
    once = [min(_seconds(call, 1) for _ in range(2)) for call in calls]
    repeats = 1 if smoke else max(1, round(_LEAST_SAMPLE / max(once)))
    fitting = int(seconds / (sum(once) * repeats))
    rounds = 2 if smoke else min(max(fitting, _LEAST_ROUNDS), _MOST_ROUNDS)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            times[which].append(_seconds(calls[which], repeats))
    return Rounds(tuple(times[0]), tuple(times[1]))


def _seconds(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
