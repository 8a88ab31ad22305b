"""A policy's sites as a table: neighbouring heads that are decided alike share a line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from adaattn_compiler.decision import describe_head
from adaattn_compiler.policy.parts import SitePolicy

_TITLES = ("site", "heads", "decision", "mean error", "p99 error", "budget")


def table(sites: Sequence[SitePolicy]) -> list[str]:
    """Lines in aligned columns; of heads that share one the largest error, the smallest budget."""
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
            *_errors(site, heads),
            f"{min(site.budget[i] for i in heads):.3g}",
        )
        for decision, heads in groups
    ]


def _errors(site: SitePolicy, heads: list[int]) -> tuple[str, str]:
    """The largest of the heads; "-" where one of them was not measured."""
    measured = [error for i in heads if (error := site.error[i]) is not None]
    if len(measured) < len(heads):
        return "-", "-"
    return f"{max(e.mean for e in measured):.3g}", f"{max(e.p99 for e in measured):.3g}"
