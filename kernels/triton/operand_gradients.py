"""Gradients of the operands that a score reads, each with the launches and sums that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaattn_compiler.kernels.triton.backward_call import Call
from adaattn_compiler.kernels.triton.gradient_source import GRAD_BIAS, GRAD_DISTANCE, of_blocks
from adaattn_compiler.kernels.triton.gradient_sums import along_diagonals, offset_of, spread
from adaattn_compiler.kernels.triton.readings import Reading, Sums
from adaattn_compiler.spec import b, h, k, q

# The operand, and what one place where it is read gives it.
Part = tuple[int, torch.Tensor]


def of_sums(
    call: Call,
    found: Sequence[Reading],
    sums: torch.Tensor | None,
    operands: Sequence[torch.Tensor],
    chosen: Sequence[int],
) -> list[Part]:
    """Of sums by rows or columns, in the order of what was summed."""
    if sums is None:
        return []
    sizes = call.numbers()
    return [
        (each.operand, spread(part, 0, each, operands[each.operand], sizes))
        for each, part in zip(found, sums.unbind(0), strict=True)
        if each.operand in chosen
    ]


def of_launches(call: Call, operands: Sequence[torch.Tensor], chosen: Sequence[int]) -> list[Part]:
    """Of what has launches of its own."""
    parts = []
    for number, each in enumerate(of_blocks(call.made_for)):
        if each.operand in chosen:
            make = _dense if each.sums is Sums.ELEMENTS else _by_distance
            parts.append((each.operand, make(call, number, each, operands[each.operand])))
    return parts


def _items(call: Call, reading: Reading) -> tuple[Any, Any, Any]:
    """(batch items that have their own number, or 1; heads likewise; how many share a number)."""
    batch, heads = call.sizes[:2]
    per_batch, per_head = (reading.axis_of(position) is not None for position in (b, h))
    sharing = (1 if per_batch else batch) * (1 if per_head else heads)
    return batch if per_batch else 1, heads if per_head else 1, sharing


def _dense(call: Call, number: int, reading: Reading, operand: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias for each query and key."""
    grad = torch.zeros_like(operand, memory_format=torch.contiguous_format)
    sizes = call.numbers()
    offsets = [offset_of(axis, sizes) for axis in reading.axes]
    fixed = (i for i, axis in enumerate(reading.axes) if axis.position is None)
    arguments: dict[str, Any] = {"bias_from": sum(offsets[i] * grad.stride(i) for i in fixed)}
    for position in (b, h, q, k):
        axis = reading.axis_of(position)
        arguments[f"stride_bias_{position}"] = 0 if axis is None else grad.stride(axis)
        if axis is not None and position in (q, k):
            arguments |= {f"{position}_from": offsets[axis], f"{position}_size": grad.shape[axis]}
    name = f"{GRAD_BIAS} {number}"
    rows, columns = call.blocks(name)
    own_batch, own_heads, items = _items(call, reading)
    programs = rows * columns * own_batch * own_heads
    call.launch(name, programs, bias_ptr=grad, items=items, **arguments)
    return grad


def _by_distance(call: Call, number: int, reading: Reading, operand: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias for each difference of key and query."""
    name = f"{GRAD_DISTANCE} {number}"
    rows, columns = call.blocks(name)
    own_batch, own_heads, items = _items(call, reading)
    block = call.specialized[name].tiles.keys
    diagonals = rows + columns - 1
    shape = (own_batch * own_heads, diagonals, 2, block)
    sums = call.like("q").new_empty(shape, dtype=torch.float32)
    call.launch(name, own_batch * own_heads * diagonals, sums_ptr=sums, items=items)
    by_step = along_diagonals(sums).unflatten(0, (own_batch, own_heads))
    return spread(by_step, -rows * block, reading, operand, call.numbers())
