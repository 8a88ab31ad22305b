"""Choosing by the seed heuristic (kernels/heuristic.py), as far as a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from adaattn_compiler.calibrate.board import Tensors, exactly
from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.calibrate.select import Selection, backed_off, options_of
from adaattn_compiler.decision import HeadDecision
from adaattn_compiler.kernels.heuristic import nearest, ranks_of, seed_decisions
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.statistics import head_statistics
from adaattn_compiler.passes.choices import SiteKey

# What each head of a site is proposed.
Proposals = dict[SiteKey, tuple[HeadDecision, ...]]


class Proposing:
    """The handler that asks the heuristic at the first call of each site, and answers exactly."""

    def __init__(self) -> None:
        self.proposals: Proposals = {}

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        if key not in self.proposals:
            q, k, v, operands, params = tensors
            statistics = head_statistics(q, k, v, operands, params, problem.spec)
            ranks = ranks_of(q, k, problem.spec, operands, params)
            self.proposals[key] = seed_decisions(statistics, ranks, k.shape[2])
        return exactly(key, problem, tensors)


def proposed(sites: Mapping[SiteKey, SiteMeasurements], proposals: Proposals) -> Selection:
    """The candidates that proposals stand for; sites without any are exact."""
    return {
        key: tuple(max(nearest(wanted, site.candidates), 0) for wanted in proposals[key])
        if key in proposals
        else (0,) * site.problem.shape.heads
        for key, site in sites.items()
    }


def within_head_by_head(
    sites: Mapping[SiteKey, SiteMeasurements], wanted: Selection, limit: float
) -> Selection:
    """As proposed, but exact where a head's error is above a limit."""
    return {
        key: tuple(
            c if float(errors[c, head]) <= limit else 0 for head, c in enumerate(wanted[key])
        )
        for key, errors in ((key, site.p99()) for key, site in sites.items())
    }


def within_together(
    sites: Mapping[SiteKey, SiteMeasurements],
    wanted: Selection,
    holds: Callable[[Selection], bool],
) -> Selection:
    """As proposed, but the heads of the largest errors exact, as few as it takes to hold."""
    if holds(wanted):
        return wanted
    return backed_off({key: options_of(site) for key, site in sites.items()}, wanted, holds)


def in_words(wanted: Selection, selection: Selection) -> str:
    """How much of what was proposed is taken."""
    pairs = [
        (one, other)
        for key, heads in wanted.items()
        for one, other in zip(heads, selection[key], strict=True)
    ]
    asked = sum(one != 0 for one, _ in pairs)
    over = sum(one != other for one, other in pairs)
    return (
        f"the heuristic proposed less than exact for {asked} of {len(pairs)} heads; {over} of "
        "these are over the budget, and exact"
    )
