"""What an error of each head does to the whole model, measured by disturbing that head alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.calibrate.outcome import Outcome
from adaattn_compiler.calibrate.progress import Progress
from adaattn_compiler.calibrate.select import Options, Selection, options_of
from adaattn_compiler.passes.choices import SiteKey

# Heads up to which the weight of each is measured by itself; above it, of each site's together.
_MOST_WEIGHED_HEADS = 128
# The error at which a head's weight is measured, about.
_WEIGHING_ERROR = 0.05

_Place = tuple[SiteKey, int]


def weighed(
    sites: Mapping[SiteKey, SiteMeasurements],
    outcome_of: Callable[[Selection], Outcome],
    progress: Progress,
) -> dict[SiteKey, Options]:
    """What each site's heads can take, with the damage that one measured error of each tells."""
    weights = {key: torch.zeros(_heads(site), dtype=torch.float64) for key, site in sites.items()}
    groups = _groups(sites)
    for i, group in enumerate(groups):
        progress("weighing heads", i, len(groups))
        selection, squares = _disturbed(group, sites)
        outcome = outcome_of(selection)
        damage = outcome.output_error**2 if outcome.kl is None else outcome.kl
        for key, head in group:
            weights[key][head] = max(damage, 0.0) / squares if squares else 0.0
    return {key: options_of(site, weights[key]) for key, site in sites.items()}


def _groups(sites: Mapping[SiteKey, SiteMeasurements]) -> list[list[_Place]]:
    """Heads that are weighed together."""
    of_sites = [[(key, head) for head in range(_heads(site))] for key, site in sites.items()]
    if sum(map(len, of_sites)) > _MOST_WEIGHED_HEADS:
        return of_sites
    return [[place] for group in of_sites for place in group]


def _disturbed(
    group: Sequence[_Place], sites: Mapping[SiteKey, SiteMeasurements]
) -> tuple[Selection, float]:
    """All exact but some heads, and the sum of their squared errors."""
    selection = {key: [0] * _heads(site) for key, site in sites.items()}
    squares = 0.0
    for key, head in group:
        error = sites[key].mean()[:, head]
        distance = (error.clamp(min=1e-9) / _WEIGHING_ERROR).log().abs()
        distance[0] = float("inf")
        selection[key][head] = int(distance.argmin())
        squares += float(error[selection[key][head]]) ** 2
    return {key: tuple(chosen) for key, chosen in selection.items()}, squares


def _heads(site: SiteMeasurements) -> int:
    return site.problem.shape.heads
