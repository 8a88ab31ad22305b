"""Budgets: what may be given, and what heads get that are given none."""

from __future__ import annotations

import math

import pytest
import torch
from decided import BF16, WINDOW
from specs import problem_of

import adaattn_compiler
from adaattn_compiler.calibrate.draft import site_policy
from adaattn_compiler.calibrate.given import asked_for
from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.calibrate.select import options_of, weighed
from adaattn_compiler.decision import EXACT
from adaattn_compiler.kernels.envelope import names
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import Budget

KINDS = ("budget", "output_budget", "max_perplexity_change")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [5, 1.001, 0, -0.1, math.inf, math.nan])
def test_budget_out_of_range_is_refused(kind: str, value: float) -> None:
    says = rf"^{kind} is {value}; it must be above 0, at most 1 \(write 5% as 0\.05\)"
    with pytest.raises(ValueError, match=says):
        adaattn_compiler.calibrate(torch.nn.Identity(), [(torch.ones(1),)], **{kind: value})


@pytest.mark.parametrize("kind", KINDS)
def test_budget_in_range_is_taken(kind: str) -> None:
    for value in (1, 1e-9):
        given = {**dict.fromkeys(KINDS), kind: value}
        assert asked_for(**given) == Budget(kind, float(value))


def measured(*errors: float) -> SiteMeasurements:
    """Of exact and two ways that are twice as fast; errors: of the first of them, by head."""
    problem = problem_of("causal")
    heads = problem.shape.heads
    candidates = (EXACT, WINDOW, BF16)
    return SiteMeasurements(
        SiteKey("", 0),
        problem,
        candidates,
        torch.tensor([[2.0], [1.0], [1.5]]).double().expand(-1, heads),
        [torch.tensor([[0.0] * heads, errors, [0.01] * heads])],
        torch.zeros(len(names()), heads),
        torch.ones(len(names()), heads),
        [64],
        [64],
    )


def test_no_head_gets_a_budget_above_the_largest() -> None:
    """Twice what calibration saw would be: at that nothing is over it any more."""
    site = measured(0.9, 0.6, 0.3, 0.0)
    policy = site_policy(site, (1, 1, 1, 1), None, Budget("output_budget", 0.5), None)
    assert (policy.computes or {})["mask"] == "causal"
    assert policy.budget == pytest.approx((1.0, 1.0, 0.6, 0.005))


def test_what_is_further_off_than_any_budget_is_not_chosen() -> None:
    """Though nothing of it may reach the model's output."""
    options = options_of(measured(1.1, 0.9, 1.5, 0.1), weight=torch.zeros(4))
    assert weighed(options, 1.0) == (2, 1, 2, 1)
