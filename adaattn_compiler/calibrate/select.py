"""Which candidate each head takes: rank and precision together, by measured error and time.

A candidate is a whole decision (pattern and precisions), measured as such: the errors of its parts
add up in the measurement, so no budget has to be split between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.decision import HeadDecision
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import LARGEST_BUDGET

# For each site the number of the candidate that each head takes.
Selection = dict[SiteKey, tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    """What a site's heads can take. seconds: of one head, [candidates, heads], or [candidates, 1]
    where all take the same. error: [candidates, heads], what is held to a budget. damage:
    [candidates, heads], what a candidate is thought to do to the model's output; all 0 where only
    the budget counts."""

    seconds: torch.Tensor
    error: torch.Tensor
    damage: torch.Tensor


def options_of(site: SiteMeasurements, weight: torch.Tensor | None = None) -> Options:
    """weight: by head, what a squared relative error of 1 would do to the model's output. What is
    further off than a budget may be at run time is not to be had, whatever it does."""
    error = site.p99().double()
    seconds = torch.where(error <= LARGEST_BUDGET, site.seconds, float("inf"))
    damage = torch.zeros_like(error)
    if weight is not None:
        damage = torch.stack(site.errors).double().square().mean(0) * weight
    return Options(seconds, error, damage)


def within(options: Options, limit: float) -> tuple[int, ...]:
    """For each head the fastest candidate whose error is within a limit; exact has none."""
    cost = torch.where(options.error <= limit, options.seconds, float("inf"))
    return _least(cost, options)


def weighed(options: Options, price: float) -> tuple[int, ...]:
    """For each head the candidate of the least seconds + price * damage."""
    return _least(options.seconds + price * options.damage, options)


def _least(cost: torch.Tensor, options: Options) -> tuple[int, ...]:
    """Of equal costs the one with less error."""
    best = cost.amin(0)
    error = torch.where(cost <= best, options.error, float("inf"))
    return tuple(int(i) for i in error.argmin(0))


def by_price(
    sites: Mapping[SiteKey, Options], holds: Callable[[Selection], bool], steps: int = 8
) -> Selection:
    """The fastest selection that was found to hold, by halving the price of damage.

    holds: whether a selection keeps to the budget, as measured; a selection without damage does.
    """

    def at(price: float) -> Selection:
        return {key: weighed(options, price) for key, options in sites.items()}

    low, high = 1e-9, 1e9  # seconds for a unit of damage
    best = at(high)
    seen: dict[tuple[tuple[int, ...], ...], bool] = {}
    if not _holds_once(best, holds, seen):
        return backed_off(sites, best, holds)
    for _ in range(steps * 3):
        middle = (low * high) ** 0.5
        found = at(middle)
        if _holds_once(found, holds, seen):
            best, high = found, middle
        else:
            low = middle
        if high / low < 1.15 or len(seen) > steps:
            break
    return best


def _holds_once(
    selection: Selection,
    holds: Callable[[Selection], bool],
    seen: dict[tuple[tuple[int, ...], ...], bool],
) -> bool:
    key = tuple(selection.values())
    if key not in seen:
        seen[key] = holds(selection)
    return seen[key]


def backed_off(
    sites: Mapping[SiteKey, Options], selection: Selection, holds: Callable[[Selection], bool]
) -> Selection:
    """The selection with its most damaging heads exact, as few as it takes to hold, by halves."""
    order = sorted(
        ((key, head) for key, chosen in selection.items() for head, c in enumerate(chosen) if c),
        key=lambda place: -_damage(sites, selection, place),
    )
    low, high = 0, len(order)  # how many become exact: too few, and enough
    while high - low > 1:
        middle = (low + high) // 2
        if holds(_without(selection, order[:middle])):
            high = middle
        else:
            low = middle
    return _without(selection, order[:high])


def _damage(
    sites: Mapping[SiteKey, Options], selection: Selection, place: tuple[SiteKey, int]
) -> float:
    key, head = place
    options, candidate = sites[key], selection[key][head]
    damage = float(options.damage[candidate, head])
    return damage or float(options.error[candidate, head])


def _without(selection: Selection, places: list[tuple[SiteKey, int]]) -> Selection:
    exact = set(places)
    return {
        key: tuple(0 if (key, head) in exact else c for head, c in enumerate(chosen))
        for key, chosen in selection.items()
    }


def decisions(
    selection: Selection, sites: Mapping[SiteKey, SiteMeasurements]
) -> dict[SiteKey, tuple[HeadDecision, ...]]:
    """What a selection's numbers stand for."""
    return {key: sites[key].decided(chosen) for key, chosen in selection.items()}
