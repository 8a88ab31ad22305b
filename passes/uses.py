"""Refuse sites of which something else needs what lies between their two products.

A kernel computes scores, weights and the draw of a dropout anew and keeps none of them: where the
model returns one of them, or uses it elsewhere, the site stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from adaattn_compiler.passes.canonical_view import CanonicalView
from adaattn_compiler.passes.site import Refused, Site, checked


def check_uses(view: CanonicalView, found: Sequence[Site | Refused]) -> list[Site | Refused]:
    """See the module's docstring. Repeated, as a site that stays may need what another computes."""
    refused: dict[fx.Node, str] = {}
    while True:
        kept = [s for s in found if isinstance(s, Site) and s.output not in refused]
        live = view.live_without({site.output: site.inputs for site in kept})
        reasons = {site.output: _reason(site, live) for site in kept}
        newly = {output: reason for output, reason in reasons.items() if reason is not None}
        if not newly:
            break
        refused |= newly
    return checked(found, lambda site: refused.get(site.output))


def _reason(site: Site, live: frozenset[fx.Node]) -> str | None:
    """Why a site must stay, if so, of the nodes that are still needed without any site."""
    if any(node in live for node in site.noise):
        return "the dropout mask is used outside the attention (returned, or applied again)"
    if site.anchor is not site.output and site.anchor in live:
        return "the attention weights are used outside the attention (returned, or stored)"
    if site.scores in live:
        return "the scores are used outside the attention (returned, or by what is not understood)"
    return None
