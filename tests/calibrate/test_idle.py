"""Why a calibration chose nothing, where its measurements cannot be true."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_model import LENGTH, build

from adaattn_compiler import calibrate
from adaattn_compiler.calibrate import chosen
from adaattn_compiler.calibrate.board import Tensors
from adaattn_compiler.calibrate.measure import Measuring, SiteMeasurements
from adaattn_compiler.policy import Policy


def calibrated(
    monkeypatch: pytest.MonkeyPatch, times: float, budget: float, length: int = LENGTH
) -> Policy:
    """With measurements by which each candidate takes so many times as long as exact."""

    def seconds_of(
        self: Measuring, site: SiteMeasurements, tensors: Tensors
    ) -> tuple[tuple[float, ...], ...]:
        heads = site.problem.shape.heads
        return tuple((0.001 * (times if i else 1),) * heads for i in range(len(site.candidates)))

    monkeypatch.setattr(Measuring, "_seconds_of", seconds_of)
    monkeypatch.setattr(chosen, "least_seconds", lambda ways: [2e-3, 1e-3])
    tokens = torch.randint(16, (1, length), generator=torch.Generator().manual_seed(0))
    return calibrate(build(), [(tokens,)], budget=budget)


def test_less_work_that_is_no_faster_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = calibrated(monkeypatch, 1.25, 1.0)
    assert all(site.decision.is_exact for site in policy.sites)
    (said,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "window 64" in said
    assert "70% of the work and took 1.25 times as long as exact" in said
    assert "The machine was busy, or the samples are too short to tell (256 keys)" in said


@pytest.mark.parametrize(
    ("times", "budget", "length"),
    [
        (0.5, 1.0, LENGTH),  # something was chosen
        (1.25, 1e-9, LENGTH),  # it is the errors that nothing was chosen for
        (1.25, 1.0, 64),  # there is nothing with less work
    ],
)
def test_where_measurements_may_be_true_nothing_is_said(
    times: float,
    budget: float,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = calibrated(monkeypatch, times, budget, length)
    assert any(not site.decision.is_exact for site in policy.sites) == (times < 1)
    assert "busy" not in caplog.text
