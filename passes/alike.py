"""Attentions that are computed alike: what was read of one is carried over to the next.

The layers of a model differ in names and weights only. All that the matcher may look at lies above
an attention's result, up to inputs, constants and calls that are left whole. Where two such regions
have the same calls with the same arguments on tensors of the same kinds, node by node, the site of
one becomes the site of the other by naming its nodes instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from adaattn_compiler.passes.assemble import module_path
from adaattn_compiler.passes.canonical_view import (
    CanonicalView,
    getitem,
    opaque,
    origin_of,
    overwritten,
    owner_of,
)
from adaattn_compiler.passes.site import Operand, SideTensor, Site
from adaattn_compiler.passes.views import Access

# Regions beyond this many nodes are not compared: nothing above bounds them.
_MOST_NODES = 400


@dataclass(frozen=True)
class Region:
    """All nodes above one, in a fixed order, and a key that is equal for regions alike."""

    nodes: tuple[fx.Node, ...]
    key: tuple[Any, ...]


class Matched:
    """The sites of one view so far, by what they were read from."""

    def __init__(self, view: CanonicalView) -> None:
        self._view = view
        self._sites: dict[Any, tuple[Region, Site]] = {}

    def alike(self, region: Region | None) -> Site | None:
        """The site of this region, where one like it was matched; else None."""
        if region is None or region.key not in self._sites:
            return None
        first, site = self._sites[region.key]
        return _moved(site, dict(zip(first.nodes, region.nodes, strict=True)))

    def add(self, region: Region | None, site: Site) -> None:
        """Remember a region's site, where all that it names is in the region."""
        if region is not None and _named(site) <= set(region.nodes):
            self._sites.setdefault(region.key, (region, site))

    def region(self, output: fx.Node) -> Region | None:
        """What lies above a node; None where that is too much to compare."""
        number: dict[fx.Node, int] = {output: 0}
        order = [output]
        for node in order:  # grows as it is walked
            if len(order) > _MOST_NODES:
                return None
            if not self._ends(node):
                for other in (*node.all_input_nodes, *_items(node)):
                    if other not in number:
                        number[other] = len(order)
                        order.append(other)
        return Region(tuple(order), tuple(self._described(node, number) for node in order))

    def _ends(self, node: fx.Node) -> bool:
        return node.target in (opaque, overwritten) or node.op == "placeholder"

    def _described(self, node: fx.Node, number: Mapping[fx.Node, int]) -> tuple[Any, ...]:
        """What the matcher may ask of a node."""
        fake = node.meta.get("fake")
        facts = (
            node.meta.get("tensor"),
            node.meta.get("grad"),
            getattr(fake, "requires_grad", None),
            node in self._view.live,
        )
        if node in self._view.constants or node in self._view.buffers:
            return (node, *facts)  # its value counts: alike is only what reads this very one
        if self._ends(node):
            return (node.target, _source(node), *facts)
        return (node.target, _frozen(node.args, number), _frozen(node.kwargs, number), *facts)


def _items(node: fx.Node) -> list[fx.Node]:
    """The results of a call that has several, in order (a dropout's mask beside its output)."""
    return sorted((u for u in node.users if u.target is getitem), key=lambda u: str(u.args[1]))


def _source(node: fx.Node) -> str | None:
    """Whether a placeholder is a parameter, a buffer or given by the caller."""
    if node.op != "placeholder":
        return None
    return str(owner_of(origin_of(node)))


def _frozen(value: Any, number: Mapping[fx.Node, int]) -> Any:
    """Call arguments as a hashable value, nodes by number; numbers of two types are not equal."""
    if isinstance(value, fx.Node):
        return ("node", number[value])
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item, number) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, number)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(_frozen(v, number) for v in (value.start, value.stop, value.step)))
    return (type(value), value)


def _named(site: Site) -> set[fx.Node]:
    """The nodes that a site names."""
    named = {site.anchor, site.output, *site.noise, *site.inputs}
    named |= {side.node for side in site.sides} | {access.node for access, _ in site.readings}
    return named | ({site.scores} if site.scores is not None else set())


def _moved(site: Site, to: Mapping[fx.Node, fx.Node]) -> Site:
    """A site with other nodes in place of its own."""

    def access(old: Access) -> Access:
        return Access(to[old.node], old.index)

    def operand(old: Operand) -> Operand:
        return Operand(access(old.access), old.target)

    def side(old: SideTensor) -> SideTensor:
        return SideTensor(to[old.node], None if old.distance is None else access(old.distance))

    anchor = to[site.anchor]
    return replace(
        site,
        name=module_path(anchor),
        q=operand(site.q),
        k=operand(site.k),
        v=operand(site.v),
        sides=tuple(side(old) for old in site.sides),
        anchor=anchor,
        output=to[site.output],
        scores=None if site.scores is None else to[site.scores],
        noise=tuple(to[node] for node in site.noise),
        readings=tuple((access(at), element) for at, element in site.readings),
    )
