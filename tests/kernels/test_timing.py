"""The least time of calls that take turns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from adaattn_compiler.calibrate import chosen, times
from adaattn_compiler.kernels import online_runner, timing
from adaattn_compiler.kernels.timing import least_seconds


class Clock:
    """Time that passes only while something is called, and who was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.called = 0.0, ""
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def way(self, name: str, *seconds: float) -> Callable[[], None]:
        """seconds: of each call, the last of all further ones."""
        left = list(seconds)

        def call() -> None:
            self.called += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_calibration_and_online_mode_time_alike() -> None:
    assert times.least_seconds is least_seconds
    assert chosen.least_seconds is least_seconds
    assert online_runner.least_seconds is least_seconds


def test_turns_go_there_and_back_and_the_first_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    ways = [clock.way("a", 0.5, 3.0, 2.0), clock.way("b", 0.1, 1.0, 4.0)]
    assert least_seconds(ways, 2, 0.0) == pytest.approx([2.0, 1.0])
    assert clock.called == "ba" "ab" "ba"  # fmt: skip


def test_ways_that_were_called_already_are_timed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ways = [clock.way("a", 0.5, 3.0, 2.0), clock.way("b", 0.1, 1.0, 4.0)]
    assert least_seconds(ways, 2, 0.0, warm=True) == pytest.approx([0.5, 0.1])
    assert clock.called == "ab" "ba"  # fmt: skip


def test_short_calls_are_timed_more_often_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert least_seconds([clock.way("a", 0.25)], 2, 1.0, warm=True) == [0.25]
    assert clock.called == "a" * 5
    assert least_seconds([clock.way("b", 0.0)], warm=True) == [0.0]
    assert clock.called.count("b") == 30


def test_nothing_to_time_takes_no_time() -> None:
    assert least_seconds([]) == []
