"""Translation validation: every match is run against what it was matched from.

The slice of the view between a site's operands and its result is run as the model wrote it, on
small random inputs in float64, beside the oracle's reading of the spec. Lengths that are large are
made small first: the sizes in the slice's calls are replaced along with those of its inputs. So
that nothing is lost by that, every mask or bias that was read into an expression is compared with
the tensor it was read from at its true size too, on rows drawn at random.

Disagreement, or a slice that cannot be run, refuses the site. Sites that are alike (the layers of a
model) are run once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.passes.canonical_view import CanonicalView, meta_of
from adaattn_compiler.passes.index_map import Index
from adaattn_compiler.passes.resizing import Resizing
from adaattn_compiler.passes.site import Operand, Refused, Site, checked
from adaattn_compiler.passes.slices import Slice, random_values, slice_above
from adaattn_compiler.passes.symbols import size_hint
from adaattn_compiler.spec import Refusal

# Scores up to this many are computed as they are; more are made fewer by shorter lengths.
_FEW_SCORES = 1 << 17
# Lengths that large ones become: different from each other and from most other sizes.
_SHORT_ROWS, _SHORT_COLUMNS, _SHORT_BATCH = 37, 41, 2
# In float64 both sides differ by rounding alone.
_TOLERANCE = 1e-9


def validate(view: CanonicalView, found: Sequence[Site | Refused]) -> list[Site | Refused]:
    """See the module's docstring."""
    verdicts: dict[Any, str | None] = {}
    return checked(found, lambda site: _verdict(view, site, verdicts))


def _verdict(view: CanonicalView, site: Site, verdicts: dict[Any, str | None]) -> str | None:
    """Why a site is refused; None where it agrees with its slice."""
    view.deadline.check()
    try:
        piece = slice_above(view, site)
        key = (site.spec, tuple(str(s) for s in site.sizes.values()), piece.fingerprint())
        if key not in verdicts:
            verdicts[key] = _disagreement(view, site, piece)
        return verdicts[key]
    except Refusal as refusal:
        return str(refusal)


def _disagreement(view: CanonicalView, site: Site, piece: Slice) -> str | None:
    errors = []
    for resizing in _resizings(site):
        try:
            return _compared(site, piece, resizing)
        except Exception as error:
            errors.append(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    return f"the match could not be validated ({errors[0]})"


def _resizings(site: Site) -> list[Resizing]:
    """Sizes to run at: short ones where the true ones are large, then the true ones."""
    sizes = site.sizes
    hints = {name: size_hint(size, site.fake) for name, size in sizes.items()}
    scores = math.prod(hints[name] for name in ("B", "H", "M", "N"))
    true = Resizing.to(sizes, hints, hints, site.fake)
    if scores <= _FEW_SCORES:
        return [true]
    rows = min(hints["M"], _SHORT_ROWS)
    columns = rows if sizes["M"] == sizes["N"] else min(hints["N"], _SHORT_COLUMNS)
    short = {**hints, "B": min(hints["B"], _SHORT_BATCH), "M": rows, "N": columns}
    plans = [
        Resizing.to(sizes, hints, short, site.fake),
        Resizing.to(sizes, hints, {**short, "B": hints["B"]}, site.fake),
    ]
    return [*plans, true] if scores <= _FEW_SCORES * 256 else plans


def _compared(site: Site, piece: Slice, resizing: Resizing) -> str | None:
    generator = torch.Generator().manual_seed(0)
    leaves = {node: _drawn(node, site, resizing, generator) for node in piece.leaves}
    values = piece.run(leaves, resizing)
    wanted = values[site.output]
    batch, heads, rows, columns = (resizing.new[name] for name in ("B", "H", "M", "N"))
    q, k, v = (_arranged(values[o.access.node], o, resizing) for o in (site.q, site.k, site.v))
    params = [resizing.scalar(param) for param in site.params]
    operands = [
        values[side.node] if side.distance is None else _vector(values, side, site, resizing)
        for side in site.sides
    ]
    if site.scale_factor is not None:
        places = positions((site.scale_factor,), q, (batch, heads, rows, columns))
        q = q * evaluate_dense(site.scale_factor, places, operands, params)
    got = reference_attention(q, k, v, operands, params, site.spec)
    got = _in_product_layout(got, site, resizing, wanted.shape)
    return _difference(got, wanted)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> str | None:
    if got.shape != wanted.shape:
        return f"validation: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    if not torch.equal(got.isnan(), wanted.isnan()):
        return "validation: NaN in other places than in the model"
    error = (got - wanted).nan_to_num().abs().max().item() if got.numel() else 0.0
    if error > _TOLERANCE * (1 + wanted.nan_to_num().abs().max().item() if wanted.numel() else 1):
        return f"validation: differs from the model's own slice by {error:.2g} in float64"
    return None


def _drawn(
    node: fx.Node, site: Site, resizing: Resizing, generator: torch.Generator
) -> torch.Tensor:
    """A random tensor for a leaf: floats normal, integers and booleans 0 or 1."""
    meta = meta_of(node)
    operand = next((o for o in (site.q, site.k, site.v) if o.access.node is node), None)
    shape = (
        [
            resizing.extent(position, size)
            for position, size in zip(operand.access.index, meta.shape, strict=True)
        ]
        if operand is not None
        else [resizing.number(size) for size in meta.shape]
    )
    return random_values(node, shape, generator)


def _arranged(tensor: torch.Tensor, operand: Operand, resizing: Resizing) -> torch.Tensor:
    """The operand at its wanted axes, by gathering (an independent reading of its index map)."""
    return resizing.gather(tensor, operand.access.index, operand.target)


def _vector(
    values: dict[fx.Node, torch.Tensor], side: Any, site: Site, resizing: Resizing
) -> torch.Tensor:
    """The bias by distance, from the whole bias that the slice computed."""
    whole = values[side.distance.node]
    heads, rows, columns = (resizing.new[name] for name in ("H", "M", "N"))
    step = torch.arange(rows + columns - 1) - (rows - 1)
    places = {
        site.axes.batch: torch.zeros(1, dtype=torch.long),
        site.axes.head: torch.arange(heads).reshape(-1, 1),
        site.axes.query: (-step).clamp(min=0),
        site.axes.key: step.clamp(min=0),
    }
    index = tuple(_numbers(position, places, resizing) for position in side.distance.index)
    return torch.as_tensor(whole[index]).expand(heads, rows + columns - 1)


def _numbers(index: Index, places: dict[Any, torch.Tensor], resizing: Resizing) -> torch.Tensor:
    total = torch.tensor(int(resizing.value(index.constant)))
    for digit, coef in index.terms:
        place = places[digit.axis] // int(resizing.value(digit.div))
        total = total + place % resizing.digit_extent(digit) * int(resizing.value(coef))
    return total


def _in_product_layout(
    got: torch.Tensor, site: Site, resizing: Resizing, shape: Iterable[int]
) -> torch.Tensor:
    """[B,H,M,E] in the layout of the product that was matched."""
    axes = site.axes
    target = tuple(axes.renamed(position) for position in site.result)
    ours = (
        Index.of_axis(axes.batch),
        Index.of_axis(axes.head),
        Index.of_axis(axes.query),
        Index.of_axis(site.value_axis),
    )
    return resizing.gather(got, ours, target)
