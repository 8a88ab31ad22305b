"""From sums over scores to the gradient of the operand that the scores read.

Sums are [B|1, H|1, length], along the rows, the columns or the differences k - q.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from adaattn_compiler.kernels.evaluate import evaluate
from adaattn_compiler.kernels.triton.readings import STEP, Axis, Reading
from adaattn_compiler.spec import b, h, k, q

# The numbers of M, N and the run-time numbers.
Sizes = Mapping[Any, Any]


def offset_of(axis: Axis, sizes: Sizes) -> Any:
    """Where an axis is read at position 0."""
    return evaluate(axis.offset, sizes, _no_load)


def _no_load(number: int, index: tuple[Any, ...]) -> Any:
    raise AssertionError("an offset reads no operand")


def spread(
    sums_BHL: torch.Tensor, first: Any, reading: Reading, operand: torch.Tensor, sizes: Sizes
) -> torch.Tensor:
    """The gradient of an operand: 0 where it is not read. first: the position of the first sum.

    What is written is gathered, not scattered, so that it is the same each time.
    """
    sums = _reduced(sums_BHL, reading)
    place = _position_axis(reading)
    if place is not None:
        axis = reading.axes[place]
        places = torch.arange(operand.shape[place], device=operand.device)
        index = (places - offset_of(axis, sizes)) * axis.sign - first
        length = sums.shape[-1]
        index = torch.where((index >= 0) & (index < length), index, length)
        sums = F.pad(sums, (0, 1)).index_select(-1, index)
    order = [i for i in (reading.axis_of(b), reading.axis_of(h), place) if i is not None]
    sums = sums.permute([order.index(axis) for axis in sorted(order)])
    grad = torch.zeros_like(operand, memory_format=torch.contiguous_format)
    where = tuple(
        offset_of(axis, sizes) if axis.position is None else slice(0, sums.shape[order_of])
        for axis, order_of in zip(reading.axes, _places(reading), strict=True)
    )
    grad[where] = sums.to(grad.dtype)
    return grad


def _reduced(sums_BHL: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Without the axes that are not in the index, summed in float64: there may be many terms."""
    kept = (reading.axis_of(b), reading.axis_of(h), _position_axis(reading))
    gone = [axis for axis, place in enumerate(kept) if place is None]
    return sums_BHL.sum(gone, dtype=torch.float64) if gone else sums_BHL


def _position_axis(reading: Reading) -> int | None:
    found = (reading.axis_of(position) for position in (q, k, STEP))
    return next((axis for axis in found if axis is not None), None)


def _places(reading: Reading) -> list[int]:
    """For each axis of the operand, which it is of those that hold a position."""
    places, count = [], 0
    for axis in reading.axes:
        places.append(count)
        count += axis.position is not None
    return places


def along_diagonals(sums: torch.Tensor) -> torch.Tensor:
    """[X, (diagonals + 1) * block] of [X, diagonals, 2, block] as the kernel leaves them.

    The second of each pair belongs one block before the first.
    """
    above, below = sums.unbind(2)
    total = F.pad(above, (0, 0, 1, 0)) + F.pad(below, (0, 0, 0, 1))
    return total.flatten(1)
