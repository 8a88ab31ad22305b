"""Seconds of calls, in turns: on the device by events, on the host by its clock.

Before each call the device writes more memory than its cache holds, and then waits for as long as
the host takes to start the call, so that the time between two events is the device's alone. What
the host takes is measured beside it; a caller who does not wait pays the greater of the two.
Neighbouring events lie about two microseconds apart with nothing between them: that is in each
figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

LEAST_ROUNDS, MOST_ROUNDS = 7, 100
# Subjects slower than the fastest by so much leave after the least number of rounds.
_FAR = 8.0
_FLUSH_BYTES = 1 << 28
# What a call's start may take; the device waits twice as long as was seen, within these.
_LEAST_WAIT, _MOST_WAIT = 3e-5, 5e-3
_CYCLES_A_SECOND = 2.0e9


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: on the device, and of the host until the call returned."""

    device: float
    host: float


class Stopwatch(Protocol):
    """Times calls of one device."""

    def samples(self, calls: Sequence[Call], waits: Sequence[float]) -> list[Sample]:
        """Each call once, in that order; waits: seconds that the host needs to start each."""

    def synchronize(self) -> None:
        """Wait until the device has done all."""


class HostStopwatch:
    """For the CPU, where a call has ended when it returns."""

    def samples(self, calls: Sequence[Call], waits: Sequence[float]) -> list[Sample]:
        found = []
        for call in calls:
            begin = time.perf_counter()
            call()
            spent = time.perf_counter() - begin
            found.append(Sample(spent, spent))
        return found

    def synchronize(self) -> None:
        pass


class CudaStopwatch:
    """For the current CUDA device."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def samples(self, calls: Sequence[Call], waits: Sequence[float]) -> list[Sample]:
        events = []
        hosts = []
        for call, wait in zip(calls, waits, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            self._busy(min(max(2 * wait, _LEAST_WAIT), _MOST_WAIT))
            begin.record()
            start = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - start)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        seconds = [1e-3 * begin.elapsed_time(end) for begin, end in events]
        return [Sample(device, host) for device, host in zip(seconds, hosts, strict=True)]

    def _busy(self, seconds: float) -> None:
        """Keep the device from what follows for so long. `_sleep` is private, old and stable."""
        sleep = getattr(torch.cuda, "_sleep", None)
        if sleep is not None:
            sleep(int(seconds * _CYCLES_A_SECOND))

    def synchronize(self) -> None:
        torch.cuda.synchronize()


@dataclass
class Turns:
    """Samples by subject, those of one round at the same place; what failed, and why."""

    samples: dict[str, list[Sample]]
    failures: dict[str, Exception] = field(default_factory=dict)


def in_turns(
    calls: Mapping[str, Call], stopwatch: Stopwatch, seconds: float, most: int = MOST_ROUNDS
) -> Turns:
    """Rounds in which each call runs once, for about so many seconds; no round if none is left.

    Each round begins with another subject. Subjects that are far slower than the fastest leave
    after the least number of rounds, those that fail at once.
    """
    turns = Turns({name: [] for name in calls})
    waits = _warmed_up(calls, stopwatch, turns)
    begin = time.perf_counter()
    for turn in range(most):
        if turn >= min(LEAST_ROUNDS, most):
            if time.perf_counter() - begin > seconds:
                break
            _leave(turns, waits)
        if not waits:
            break
        _one_round(turn, calls, waits, stopwatch, turns)
    turns.samples = {name: found for name, found in turns.samples.items() if found}
    return turns


def _warmed_up(calls: Mapping[str, Call], stopwatch: Stopwatch, turns: Turns) -> dict[str, float]:
    """Each called twice; the host's seconds of the second, which is what it takes to start."""
    waits: dict[str, float] = {}
    for name, call in calls.items():
        try:
            stopwatch.samples([call], [_LEAST_WAIT])
            waits[name] = stopwatch.samples([call], [_LEAST_WAIT])[0].host
        except Exception as error:
            turns.failures[name] = error
    return waits


def _one_round(
    turn: int,
    calls: Mapping[str, Call],
    waits: dict[str, float],
    stopwatch: Stopwatch,
    turns: Turns,
) -> None:
    names = list(waits)
    first = turn % len(names)
    for name in names[first:] + names[:first]:
        try:
            turns.samples[name] += stopwatch.samples([calls[name]], [waits[name]])
        except Exception as error:
            turns.failures[name] = error
            turns.samples[name] = []
            del waits[name]


def _leave(turns: Turns, waits: dict[str, float]) -> None:
    medians = {
        name: statistics.median(sample.device for sample in turns.samples[name]) for name in waits
    }
    least = min(medians.values(), default=0.0)
    for name, found in medians.items():
        if found > _FAR * least:
            del waits[name]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and greatest."""
    if len(values) == 1:
        lower = upper = values[0]
    else:
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "least": min(values),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "greatest": max(values),
    }


def ratios(theirs: Sequence[Sample], ours: Sequence[Sample]) -> dict[str, float]:
    """Times that ours is faster on the device, over the rounds in which both ran."""
    return spread([t.device / o.device for t, o in zip(theirs, ours, strict=False)])
