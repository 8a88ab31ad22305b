"""What the report shows of each head: numbers, the colors they have in pictures, and in words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.calibrate.pictures import Cell, Point, percent
from adaattn_compiler.decision import BLOCK, HeadDecision, Precision, describe_head
from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.patterns import kept_blocks
from adaattn_compiler.policy import SitePolicy

# The classes of representations and precisions, and what legends say of them.
KINDS = {
    "exact": "exact",
    "fewer": "all keys, in fewer bits",
    "skip": "all keys, negligible blocks left out",
    "window": "a window of keys (its size)",
    "selection": "blocks chosen in each call",
    "pooling": "far keys by their means",
    "nystrom": "through landmarks",
    "basis": "scores in a basis of the keys",
}
BITS = {"s0": "fp32, as exact", "s2": "bf16 in one product", "s4": "bf16 in both"}
# From where on each class of a scale is: shares of the keys, or of a head's budget.
STEPS = {"s0": 0.0, "s1": 0.1, "s2": 0.25, "s3": 0.4, "s4": 0.6, "s5": 0.8, "s6": 0.95}


_LEAST_SHOWN = 0.0001


@dataclass(frozen=True)
class DecidedSite:
    """A site as decided, with what was measured of it. timed: (exact, decided) seconds."""

    policy: SitePolicy
    measured: SiteMeasurements
    timed: tuple[float, float] | None

    @property
    def predicted(self) -> tuple[float, float]:
        """Seconds, exactly and as decided, by the times of its heads' candidates."""
        seconds = self.policy.seconds
        return (0.0, 0.0) if seconds is None else (seconds.exact, seconds.decided)

    @property
    def taken(self) -> tuple[float, float]:
        """Seconds, exactly and as decided, measured; of a site that is all exact, that twice."""
        exact = self.predicted[0]
        return (exact, exact) if self.timed is None else self.timed


CellOf = Callable[[DecidedSite, int], Cell]


def speedup(seconds: Sequence[tuple[float, float]]) -> float:
    """Of all together; 1 where nothing takes time."""
    exact, decided = (sum(times) for times in zip(*seconds, strict=True))
    return exact / decided if decided else 1.0


# -- a head ----------------------------------------------------------------------------------------


def kind_cell(site: DecidedSite, head: int) -> Cell:
    decision = site.policy.decision.heads[head]
    near = decision.pooling.near if decision.pooling else decision.pattern
    return Cell(_kind(decision), str(near.window) if near else "", tooltip(site, head))


def bits_cell(site: DecidedSite, head: int) -> Cell:
    decision = site.policy.decision.heads[head]
    fewer = sum(p is not Precision.FP32 for p in (decision.scores, decision.values))
    return Cell(list(BITS)[fewer], "", tooltip(site, head))


def keys_cell(site: DecidedSite, head: int) -> Cell:
    share = keys_of(site, head)
    return Cell(step_of(share), f"{100 * share:.0f}", tooltip(site, head))


def error_cell(site: DecidedSite, head: int) -> Cell:
    error, budget = _p99(site, head), site.policy.budget[head]
    text = _short(error)
    if error is not None and error > budget:
        return Cell("over", text, tooltip(site, head))
    return Cell(step_of(error / budget if error and budget else 0.0), text, tooltip(site, head))


def tooltip(site: DecidedSite, head: int) -> str:
    """All that is known of a head, in a line."""
    decision, keys, mean, p99, budget = numbers(site, head)
    return (
        f"{site.policy.label}, head {head}: {decision}; attends to {keys} of its keys; error "
        f"{mean} (mean), {p99} (p99), budget {budget}"
    )


def numbers(site: DecidedSite, head: int) -> tuple[str, ...]:
    """(decision, share of keys, mean error, p99 error, budget)."""
    error = site.policy.error[head]
    errors = ("-", "-") if error is None else (percent(error.mean), percent(error.p99))
    decision = describe_head(site.policy.decision.heads[head])
    keys = f"{100 * keys_of(site, head):.0f}%"
    return decision, keys, *errors, percent(site.policy.budget[head])


def keys_of(site: DecidedSite, head: int) -> float:
    """Of the blocks that the mask leaves, the share that the head computes, on the longest sample.
    Blocks that are chosen or skipped in each call count as computed."""
    found = site.measured
    rows, columns = max(found.rows), max(found.columns)
    left = _left_by_mask(found, rows, columns)
    kept = kept_blocks(site.policy.decision.heads[head], rows, columns)
    return float((kept & left).sum()) / max(float(left.sum()), 1.0)


def _left_by_mask(site: SiteMeasurements, rows: int, columns: int) -> torch.Tensor:
    problem = site.problem
    mask, params = problem.spec.mask, problem.param_hints
    return _blocks(mask, rows, columns, params)


@functools.lru_cache(maxsize=64)
def _blocks(mask: object, rows: int, columns: int, params: tuple[int, ...]) -> torch.Tensor:
    structure = block_structure(mask, rows, columns, BLOCK, BLOCK, params)
    return structure.partial | structure.full


def _kind(decision: HeadDecision) -> str:
    named = {
        "pooling": decision.pooling,
        "nystrom": decision.nystrom,
        "selection": decision.selection,
        "window": decision.pattern,
        "basis": decision.basis,
        "skip": decision.skip,
    }
    given = [name for name, value in named.items() if value is not None]
    return next(iter(given), "exact" if decision.is_exact else "fewer")


def step_of(share: float) -> str:
    """The class of a share."""
    return [style for style, begin in STEPS.items() if share >= begin][-1]


def _short(error: float | None) -> str:
    """In percent, in as few characters as a cell has room for."""
    if not error:
        return ""
    return percent(error).removesuffix("%") if error >= _LEAST_SHOWN else "<.01"


def _p99(site: DecidedSite, head: int) -> float | None:
    error = site.policy.error[head]
    return None if error is None else error.p99


# -- a candidate -----------------------------------------------------------------------------------


def points(site: DecidedSite) -> list[Point]:
    """Every candidate of a site, with the heads that chose it."""
    found, heads = site.measured, site.policy.decision.heads
    seconds = found.seconds.sum(1).tolist()
    exact = seconds[0] or 1.0
    return [
        Point(
            describe_head(candidate),
            its_seconds / exact,
            *_spread(errors),
            # In words: of a basis of keys each key head has its own.
            tuple(i for i, h in enumerate(heads) if describe_head(h) == describe_head(candidate)),
        )
        for candidate, its_seconds, errors in zip(
            found.candidates, seconds, found.p99(), strict=True
        )
    ]


def _spread(errors: torch.Tensor) -> tuple[float, float, float]:
    """(least, median, largest); what is not a number counts as without limit."""
    known = errors.nan_to_num(nan=math.inf, posinf=math.inf)
    return float(known.min()), float(known.median()), float(known.max())
