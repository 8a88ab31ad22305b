"""How long ways to compute the same take beside each other, in one process and on given tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

Way = Callable[[], object]

_MOST_ROUNDS = 30


def least_seconds(
    ways: Sequence[Way], rounds: int = 3, seconds: float = 2.0, *, warm: bool = False
) -> list[float]:
    """The least that each takes, called in turns: other processes only ever make calls slower.

    rounds: at least so many, more while they take no longer than `seconds` together. warm: each has
    been called already; else a first round, in which lists are made, is not counted.
    """
    least, begun = [float("inf")] * len(ways), time.perf_counter()
    for turn in range(1 if warm else 0, _MOST_ROUNDS + 1):
        if turn > rounds and time.perf_counter() - begun > seconds:
            break
        order = range(len(ways)) if turn % 2 else reversed(range(len(ways)))
        for i in order:  # there and back: what a way leaves behind disturbs the next
            begin = time.perf_counter()
            ways[i]()
            if turn:
                least[i] = min(least[i], time.perf_counter() - begin)
    return least
