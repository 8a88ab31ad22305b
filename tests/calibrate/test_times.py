"""Times by head: what skipping saves is shared by the heads as they skip."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from adaattn_compiler.calibrate import times
from adaattn_compiler.calibrate.times import Timekeeping
from adaattn_compiler.decision import EXACT, HeadDecision, Precision, Selection

BITS = HeadDecision(scores=Precision.BF16, values=Precision.BF16)
SKIPPING = HeadDecision(scores=Precision.BF16, values=Precision.BF16, skip=6.0)
CHOOSING = HeadDecision(selection=Selection(0.9))
CANDIDATES = (EXACT, BITS, SKIPPING, CHOOSING)


def seconds_of(
    monkeypatch: pytest.MonkeyPatch,
    together: Sequence[float],
    skipped: Sequence[int],
    further: Sequence[float] | None = None,
) -> tuple[tuple[float, ...], ...]:
    """together: what one call of each takes; further: at a second site, of those timed there."""
    answers = iter([together, together[2:], further])

    def measured(ways: Sequence[object], *limits: object) -> list[float]:
        found = next(answers)
        assert found is not None
        assert len(found) == len(ways)
        return list(found)

    monkeypatch.setattr(times, "least_seconds", measured)
    keeping = Timekeeping()

    def at_a_site() -> tuple[tuple[float, ...], ...]:
        ways = [lambda: None] * len(CANDIDATES)
        none, counts = torch.zeros(len(skipped)), torch.tensor(skipped)
        return keeping.seconds("kind", CANDIDATES, ways, lambda i: counts if i == 2 else none)

    first = at_a_site()
    return first if further is None else at_a_site()


def test_heads_share_what_they_save(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, bits, skipping, choosing = seconds_of(monkeypatch, (8.0, 4.0, 3.0, 3.0), (30, 10, 0, 0))
    assert exact == (2.0,) * 4
    assert bits == (1.0,) * 4
    assert skipping == pytest.approx((1 - 0.75, 1 - 0.25, 1.0, 1.0))
    assert choosing == (0.75,) * 4


def test_no_head_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    times_of_heads = seconds_of(monkeypatch, (8.0, 4.0, 1.0, 3.0), (30, 0, 0, 0))[2]
    assert times_of_heads == pytest.approx((0.1, 1.0, 1.0, 1.0))


def test_what_skips_nothing_takes_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_of(monkeypatch, (8.0, 4.0, 4.4, 3.0), (0, 0, 0, 0))[2] == (1.1,) * 4
    assert seconds_of(monkeypatch, (8.0, 4.0, 4.4, 3.0), (9, 0, 0, 0))[2] == (1.1,) * 4


def test_only_what_depends_on_the_tensors_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seconds_of(monkeypatch, (8.0, 4.0, 2.0, 3.0), (5, 5, 5, 5), further=(1.0, 6.0))
    assert found == ((2.0,) * 4, (1.0,) * 4, (0.25,) * 4, (1.5,) * 4)
