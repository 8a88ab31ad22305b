"""Masks and biases that were read as expressions, against the tensors that they were read from.

Validation runs a site at short lengths, where a window of 512 is no window. Here each mask (or
bias) is computed by the model's own calls at its true lengths, once for a graph, and compared with
the expression on rows drawn at random, always among them the first and the last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.passes.canonical_view import CanonicalView, meta_of
from adaattn_compiler.passes.index_map import Axis, Index
from adaattn_compiler.passes.resizing import Resizing
from adaattn_compiler.passes.site import Refused, Site, checked
from adaattn_compiler.passes.slices import random_values, slice_to
from adaattn_compiler.passes.symbols import size_hint
from adaattn_compiler.passes.views import Access
from adaattn_compiler.spec import Load, b, h, k, q

log = logging.getLogger("adaattn_compiler")

# Larger tensors are not made for a proof; they keep what validation says of them.
_MOST_ELEMENTS = 1 << 26
_ROWS, _HEADS, _BATCH = 48, 4, 2


def prove_masks(view: CanonicalView, found: Sequence[Site | Refused]) -> list[Site | Refused]:
    """Refuse sites whose masks or biases were misread."""
    verdicts: dict[Any, str | None] = {}
    values: dict[fx.Node, Any] = {}

    def reason_against(site: Site) -> str | None:
        for access, element in site.readings:
            view.deadline.check()
            key = (access, element)
            if key not in verdicts:
                verdicts[key] = _verdict(view, site, access, element, values)
            if verdicts[key] is not None:
                return f"mask not proven: {verdicts[key]}"
        return None

    return checked(found, reason_against)


def _verdict(
    view: CanonicalView, site: Site, access: Access, element: Any, values: dict[fx.Node, Any]
) -> str | None:
    """Why a reading is not believed; what goes wrong in the proof is such a reason."""
    try:
        return _disagreement(view, site, access, element, values)
    except Exception as error:
        log.debug("where a proof failed", exc_info=True)
        return f"{type(error).__name__}: {error}"


def _disagreement(
    view: CanonicalView, site: Site, access: Access, element: Any, values: dict[fx.Node, Any]
) -> str | None:
    """Where the expression differs from the tensor; None where it does not, or nothing was read."""
    if isinstance(element, Load) or not (element.has(q) or element.has(k)):
        return None
    read_from = [site.sides[int(load.args[0])] for load in element.atoms(Load)]
    if any(side.distance is not None for side in read_from):
        return None  # the vector is made from this very tensor; validation has compared it
    numel = math.prod(size_hint(size, site.fake) for size in meta_of(access.node).shape)
    if numel > _MOST_ELEMENTS:
        return None
    sizes = {name: size_hint(size, site.fake) for name, size in site.sizes.items()}
    true = Resizing.to(site.sizes, sizes, sizes, site.fake)
    tensor, operands = _computed(view, site, access.node, true, values)
    places = _drawn_places(sizes)
    read = tensor[tuple(_at(position, places, site, true) for position in access.index)]
    symbols: dict[Any, Any] = positions((), tensor, [sizes[name] for name in ("B", "H", "M", "N")])
    symbols |= {b: places["b"], h: places["h"], q: places["q"], k: places["k"]}
    params = [true.scalar(param) for param in site.params]
    expected = evaluate_dense(element, symbols, operands, params, partial=True)
    expected = torch.as_tensor(expected)
    if read.dtype == torch.bool or expected.dtype == torch.bool:
        same = bool((read.bool() == expected.bool()).all())
    else:
        same = bool(torch.isclose(read.double(), expected.double(), rtol=1e-12).all())
    return None if same else f"{access.node} is not {element}"


def _computed(
    view: CanonicalView,
    site: Site,
    node: fx.Node,
    resizing: Resizing,
    values: dict[fx.Node, Any],
) -> tuple[torch.Tensor, list[Any]]:
    """A node's tensor on random leaves, and the site's operands that go with it.

    values: what was computed before, so that all sites see one draw of a leaf.
    """
    stops = {side.node for side in site.sides if side.distance is None}
    if node not in values:
        piece = slice_to(view, node, stops - {node})
        generator = torch.Generator().manual_seed(0)
        for leaf in piece.leaves:
            if leaf not in values:
                shape = [resizing.number(size) for size in meta_of(leaf).shape]
                values[leaf] = random_values(leaf, shape, generator)
        known = {leaf: values[leaf] for leaf in piece.leaves}
        values[node] = piece.run(known, resizing)[node]
    return values[node], [values.get(side.node) for side in site.sides]


def _drawn_places(sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Some batch items, heads and rows, and all columns, as index tensors."""
    return {
        "b": _some(sizes["B"], _BATCH).reshape(-1, 1, 1, 1),
        "h": _some(sizes["H"], _HEADS).reshape(-1, 1, 1),
        "q": _some(sizes["M"], _ROWS).reshape(-1, 1),
        "k": torch.arange(sizes["N"]),
    }


def _some(size: int, count: int) -> torch.Tensor:
    if size <= count:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(size)
    inner = torch.randperm(size - 2, generator=generator)[: count - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([size - 1])])


def _at(index: Index, places: dict[str, torch.Tensor], site: Site, sizes: Resizing) -> torch.Tensor:
    """A dimension's index at the drawn places."""
    axes: dict[Axis, str] = {
        site.axes.batch: "b",
        site.axes.head: "h",
        site.axes.query: "q",
        site.axes.key: "k",
    }
    total: Any = torch.tensor(sizes.number(index.constant))
    for digit, coef in index.terms:
        value = places[axes[digit.axis]] // sizes.number(digit.div)
        total = total + value % sizes.digit_extent(digit) * sizes.number(coef)
    return torch.as_tensor(total)
