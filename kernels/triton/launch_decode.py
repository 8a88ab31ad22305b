"""Runs the kernels for few query rows (decode.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.kernels.triton.launch import (
    Products,
    Tiles,
    launchable,
    loaded,
    operand_arguments,
    power_of_two,
    products_of,
    shared_constants,
)
from adaattn_compiler.kernels.triton.source import Configuration, decode_source

# Of few rows, so that what limits is reading keys and values.
FEW_ROWS = Tiles(16, 64, 4, 3)
# One row, and as many splits at a time as there are keys in its tile.
COMBINING = Tiles(1, 16, 4, 2)
# On one multiprocessor: registers and shared memory of FEW_ROWS are enough for more.
_PROGRAMS_AT_ONCE = 2
# Fewer keys are not worth a program of their own.
_LEAST_KEYS = 256


def decode(
    made_for: Configuration,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int] = (),
    *,
    splits: int,
    tiles: Tiles = FEW_ROWS,
    precision: str | Products = "ieee",
    lse: torch.Tensor | None = None,
    keys: tuple[int, int] | None = None,
) -> torch.Tensor:
    """[B,H,M,E], laid out as [B,M,H,E]; the result does not depend on what runs beside.

    splits: programs that share the keys of a tile of rows, see `splits_for`. tiles: see
    `tiles_for_few_rows`; at least 16 rows. lse: float32 [B,H,M], contiguous, to be written.
    keys: (first, one beyond the last), where no row attends to others: those are not read.
    """
    spec = made_for.spec
    batch, heads, rows, head_dim = q_BHMD.shape
    columns, value_dim = v_BGNE.shape[2:]
    q, k, v = (with_unit_stride(tensor) for tensor in (q_BHMD, k_BGND, v_BGNE))
    out = q.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    partial, sums = _buffers(out, splits)
    first, last = (0, columns) if keys is None else keys
    module = loaded(decode_source(made_for))
    shared = shared_constants(spec, (head_dim, value_dim), tiles)
    row_tiles = -(-spec.group * rows // tiles.rows)
    launchable(module.fused_decode)[(splits * row_tiles * batch * (heads // spec.group),)](
        *(q, k, v, out, lse, partial, sums),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *(heads, rows, columns, first, last, splits),
        *params,
        *operand_arguments(operands),
        **decode_constants(shared, splits > 1, lse is not None, precision),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        launchable(module.combine_splits)[(batch * heads * rows,)](
            *(v, out, lse, partial, sums),
            *v.stride()[:3],
            *out.stride()[:3],
            *(heads, rows, columns, splits),
            *params,
            *operand_arguments(operands),
            **combine_constants(shared, lse is not None),
            num_warps=COMBINING.warps,
            num_stages=COMBINING.stages,
        )
    return out


def tiles_for_few_rows(pairs: int, widest: int, itemsize: int) -> Tiles:
    """Tiles that compile without spills; one for all rows of a key head, to 64 of them.

    pairs: of query heads and rows of one key head; widest: the larger of D and E; itemsize: bytes.
    """
    rows = min(power_of_two(pairs), 64)
    if itemsize > 2:
        return Tiles(min(rows, 32), 32, 4, 2) if widest <= 64 else Tiles(16, 16, 4, 2)
    keys = 32 if rows > 16 and widest > 128 else 64
    return Tiles(rows, keys, 8 if rows == 64 else 4, 3 if widest <= 128 else 2)


def splits_for(batch: int, kv_heads: int, columns: int, multiprocessors: int) -> int:
    """Into how many parts to divide the keys, so that the device is busy: 1 where it is anyway.

    No more programs than run at once, so that none waits for others to end, each with keys enough
    to be worth it. For tensors of no elements, too.
    """
    room = multiprocessors * _PROGRAMS_AT_ONCE // max(batch * kv_heads, 1)
    return max(min(room, columns // _LEAST_KEYS), 1)


def _buffers(out: torch.Tensor, splits: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What splits write: outputs before division [B,H,M,splits,E], maxima and sums."""
    if splits == 1:
        return None, None
    batch, heads, rows, value_dim = out.shape
    partial = out.new_empty((batch, heads, rows, splits, value_dim), dtype=torch.float32)
    return partial, out.new_empty((batch, heads, rows, splits, 2), dtype=torch.float32)


def decode_constants(
    shared: dict[str, Any], split: bool, has_lse: bool, precision: str | Products = "ieee"
) -> dict[str, Any]:
    """What `fused_decode` is specialized for, with what all templates are."""
    products = products_of(precision)
    return {**shared, "SPLIT": split, "HAS_LSE": has_lse, "QK": products.qk, "PV": products.pv}


def combine_constants(shared: dict[str, Any], has_lse: bool) -> dict[str, Any]:
    """What `combine_splits` is specialized for."""
    own = {"HAS_LSE": has_lse, "BLOCK_S": COMBINING.keys}
    needed = ("UNIT", "GROUP", "VALUE_DIM", "HAS_SINK", "EMPTY_ROW", "BLOCK_N", "BLOCK_E")
    return {**{name: shared[name] for name in needed}, **own}
