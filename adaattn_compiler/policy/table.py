"""A policy's sites as a table: neighbouring heads that are decided alike share a line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from adaattn_compiler.decision import describe_head
from adaattn_compiler.policy.parts import MeasuredError, SitePolicy

_TITLES = ("site", "heads", "decision", "mean error", "p99 error", "budget")


def table(sites: Sequence[SitePolicy]) -> list[str]:
    """Lines in aligned columns; of heads that share one, errors and budget of the head that is
    nearest to its own budget, or furthest over it (of several, of the largest error)."""
    rows = [_TITLES, *(row for site in sites for row in _rows(site))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _rows(site: SitePolicy) -> list[tuple[str, ...]]:
    alike = itertools.groupby(range(site.heads), key=lambda i: site.decision.heads[i])
    groups = [(decision, list(heads)) for decision, heads in alike]
    labels = itertools.chain([site.label], itertools.repeat(""))
    return [
        (
            next(labels),
            str(heads[0]) if len(heads) == 1 else f"{heads[0]}-{heads[-1]}",
            describe_head(decision),
            *_error_and_budget(site, heads),
        )
        for decision, heads in groups
    ]


def _error_and_budget(site: SitePolicy, heads: list[int]) -> tuple[str, str, str]:
    """Of one head, as one's error beside another's budget would say what is true of neither. Where
    a head was not measured: no error, and the smallest budget."""
    if any(site.error[i] is None for i in heads):
        return "-", "-", f"{min(site.budget[i] for i in heads):.3g}"
    error, budget = max(
        ((error, site.budget[i]) for i in heads if (error := site.error[i]) is not None),
        key=lambda pair: (_share(*pair), pair[0].p99),
    )
    return f"{error.mean:.3g}", f"{error.p99:.3g}", f"{budget:.3g}"


def _share(error: MeasuredError, budget: float) -> float:
    """Of its budget that an error uses."""
    if budget == 0.0:
        return math.inf if error.p99 else 0.0
    return error.p99 / budget
