"""Find every attention of a canonical view.

Matrix products of a softmax with V (match_product.py) and SDPA calls (match_sdpa.py) become sites.
What cannot be understood is a `Refused`, with the reason and the node where it was seen; so is a
softmax between two products of which nothing became (unmatched.py).
"""

from __future__ import annotations

import torch
from torch import fx

from adaattn_compiler.passes.alike import Matched
from adaattn_compiler.passes.canonical_view import CanonicalView
from adaattn_compiler.passes.contraction import is_contraction
from adaattn_compiler.passes.match_product import product_site
from adaattn_compiler.passes.match_sdpa import sdpa_site
from adaattn_compiler.passes.site import Refused, Site
from adaattn_compiler.passes.unmatched import unmatched

aten = torch.ops.aten


def match(view: CanonicalView) -> list[Site | Refused]:
    """The sites of a view, in graph order, with what was refused among them."""
    found: list[Site | Refused] = []
    anchors: set[fx.Node] = set()
    matched = Matched(view)
    for node in view.graph.nodes:
        view.deadline.check()
        if node not in view.live:
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            found.append(sdpa_site(view, node, matched))
        elif is_contraction(node):
            site = product_site(view, node, matched)
            if site is not None and site.anchor not in anchors:
                anchors.add(site.anchor)
                found.append(site)
    found += unmatched(view, anchors)
    order = {node: position for position, node in enumerate(view.graph.nodes)}
    found.sort(key=lambda item: order[item.anchor])
    return found
