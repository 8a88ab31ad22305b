"""What is not faster as decided stays exact, and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_model import build, fixed_times

import adaattn_compiler
from adaattn_compiler.calibrate import chosen
from adaattn_compiler.calibrate.chosen import in_words, only_faster
from adaattn_compiler.passes.choices import SiteKey

FAST, SLOW, SAME = (SiteKey(name, 0) for name in ("fast", "slow", "same"))
TIMED = {FAST: (2e-3, 1e-3), SLOW: (1e-3, 1.5e-3), SAME: (1e-3, 1e-3)}


def test_sites_that_are_not_faster_stay_exact() -> None:
    selection = {FAST: (1, 2), SLOW: (1, 0), SAME: (3, 3), SiteKey("exact", 0): (0, 0)}
    kept = {**selection, SLOW: (0, 0), SAME: (0, 0)}
    assert only_faster(selection, TIMED) == kept
    assert only_faster(kept, {FAST: TIMED[FAST]}) == kept


def test_what_stays_exact_is_said() -> None:
    said = in_words(TIMED)
    assert "slow (1.50 times as long), same (1.00 times as long)" in said
    assert "fast" not in said
    assert in_words({FAST: TIMED[FAST]}) == ""


@pytest.mark.parametrize("seconds", [(1e-3, 2e-3), (2e-3, 1e-3)])
def test_a_policy_is_of_what_was_faster(
    seconds: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fixed_times(monkeypatch)
    monkeypatch.setattr(chosen, "least_seconds", lambda ways: list(seconds))
    tokens = torch.randint(16, (1, 256), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        policy = adaattn_compiler.calibrate(build(), [(tokens,)], budget=0.9)
    slower = seconds[1] > seconds[0]
    assert all(site.decision.is_exact == slower for site in policy.sites)
    assert ("took longer as decided" in caplog.text) == slower
    assert not slower or policy.provenance.results["output_error"] == 0
