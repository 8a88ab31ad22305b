"""Runs the backward pass that is generated from a spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.through_op import FILLED_ROWS, fills_rows, with_unit_stride
from adaattn_compiler.kernels.triton.backward_call import (
    Call,
    Specialized,
    laid_out_like,
    shared_arguments,
    stride_arguments,
    table_arguments,
)
from adaattn_compiler.kernels.triton.gradient_source import (
    GRAD_BIAS,
    GRAD_DISTANCE,
    GRAD_KV,
    GRAD_Q,
    ROW_TERMS,
    backward_source,
    of_blocks,
    summed,
)
from adaattn_compiler.kernels.triton.launch import (
    Tiles,
    loaded,
    power_of_two,
    shared_constants,
)
from adaattn_compiler.kernels.triton.operand_gradients import of_launches, of_sums
from adaattn_compiler.kernels.triton.readings import Reading, Sums, readings, without_kernel
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.kernels.triton.tables import BlockTable, block_table, key_table
from adaattn_compiler.spec import AttentionSpec, EmptyRow, h, k, q


@dataclass(frozen=True)
class BackwardTiles:
    """queries: of the kernels by rows; keys: of the one by keys; biases: of the others, square."""

    queries: Tiles
    keys: Tiles
    biases: Tiles

    def numbers(self) -> tuple[tuple[int, ...], ...]:
        """All of them, as `of` takes them."""
        return tuple(dataclasses.astuple(tiles) for tiles in (self.queries, self.keys, self.biases))

    @staticmethod
    def of(numbers: Sequence[Sequence[int]]) -> BackwardTiles:
        """TypeError where they are no tiles."""
        return BackwardTiles(*(Tiles(*each) for each in numbers))


def backward_tiles(
    head_dim: int, value_dim: int, dtype: torch.dtype, capability: int = 90
) -> BackwardTiles:
    """Those that leave no registers spilled, nor much to spare. capability: 80, 90.

    Keys hold two sums, dK and dV, as large as the one of queries; biases hold none.
    """
    widest = max(power_of_two(head_dim), power_of_two(value_dim))
    if dtype == torch.float32:
        return _TILES_OF_FLOATS[min(max(widest, 64), 256)]
    return _TILES[capability >= 90, min(max(widest, 64), 256)]


def backward_tables(
    spec: AttentionSpec, rows: int, columns: int, tiles: BackwardTiles, params: Sequence[int] = ()
) -> tuple[BlockTable, BlockTable]:
    """(table, key_table) of a spec's mask: blocks of keys by rows, and blocks of rows by keys."""
    x, y = tiles.queries, tiles.keys
    by_rows = block_structure(spec.mask, rows, columns, x.rows, x.keys, params)
    by_keys = block_structure(spec.mask, rows, columns, y.rows, y.keys, params)
    return (
        block_table(by_rows, ragged=columns % x.keys != 0),
        key_table(by_keys, ragged=rows % y.rows != 0),
    )


def gradient_refusal(spec: AttentionSpec, wanted: Sequence[bool] | None = None) -> str | None:
    """Why there is no backward pass, None where there is; wanted: of which operands, else all."""
    if fills_rows(spec):
        return FILLED_ROWS
    if spec.dropout_p > 0:
        return "no dropout"
    usual = {"bool": "bool", "int": "int64", "float": "float32"}
    try:
        backward_source(Configuration(spec, tuple(usual[o.kind] for o in spec.operands)))
        missing = without_kernel(spec)
    except NoCode as error:
        return str(error)
    asked = (why for i, why in missing.items() if wanted is None or wanted[i])
    return next(asked, None)


def backward(
    made_for: Configuration,
    grad_out: torch.Tensor,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNE: torch.Tensor,
    out_BHME: torch.Tensor,
    statistics: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int] = (),
    wanted: Sequence[bool] = (),
    *,
    tiles: BackwardTiles | None = None,
    precision: str = "ieee",
    table: BlockTable | None = None,
    key_table: BlockTable | None = None,
) -> list[torch.Tensor]:
    """Gradients of q, k and v, laid out as [B,length,heads,dim], then of the wanted operands.

    statistics: float32 [B,H,M,2], as `forward` wrote them with products of the same precision.
    table: blocks for tiles.queries, by rows; key_table: for tiles.keys, by keys; where there is
    none, the closed form of the mask (ranges.py).
    """
    dims = (q_BHMD.shape[3], v_BGNE.shape[3])
    tiles = tiles or backward_tiles(*dims, q_BHMD.dtype)
    chosen = [operand for operand, want in enumerate(wanted) if want]
    given = (q_BHMD, k_BGND, v_BGNE, grad_out)
    call = Call(
        made_for,
        loaded(backward_source(made_for)),
        specialized(made_for, dims, tiles, precision, chosen, (table, key_table)),
        (q_BHMD.shape[0], q_BHMD.shape[1], q_BHMD.shape[2], k_BGND.shape[2]),
        shared_arguments(
            made_for, given, operands, params, statistics.new_empty(3, *statistics.shape[:3])
        ),
    )
    sink_sums = _row_terms(call, out_BHME, statistics, table)
    grad_q, row_sums = _grad_q(call, table)
    grad_k, grad_v, column_sums = _grad_kv(call, key_table)
    parts = [
        *of_sums(call, summed(made_for, Sums.ROWS, in_sink=True), sink_sums, operands, chosen),
        *of_sums(call, summed(made_for, Sums.ROWS), row_sums, operands, chosen),
        *of_sums(call, summed(made_for, Sums.COLUMNS), column_sums, operands, chosen),
        *of_launches(call, operands, chosen),
    ]
    grads = [_total(operands[i], [part for of, part in parts if of == i]) for i in chosen]
    return [grad_q, grad_k, _with_nan_of_empty_rows(made_for.spec, grad_v, statistics), *grads]


# By capability and the widest head.
_TILES = {
    (True, 64): BackwardTiles(Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2), Tiles(64, 64, 8, 2)),
    (True, 128): BackwardTiles(Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 64, 8, 2)),
    (True, 256): BackwardTiles(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
    (False, 64): BackwardTiles(Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2), Tiles(64, 64, 8, 2)),
    (False, 128): BackwardTiles(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)),
    (False, 256): BackwardTiles(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
}
_TILES_OF_FLOATS = {
    64: BackwardTiles(Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
    128: BackwardTiles(Tiles(32, 64, 8, 2), Tiles(16, 32, 8, 2), Tiles(32, 32, 8, 2)),
    256: BackwardTiles(Tiles(16, 32, 8, 2), Tiles(16, 32, 8, 2), Tiles(16, 16, 8, 2)),
}


# -- what kernels are specialized for --------------------------------------------------------------


def specialized(
    made_for: Configuration,
    dims: tuple[int, int],
    tiles: BackwardTiles,
    precision: str,
    chosen: Sequence[int],
    tables: tuple[BlockTable | None, BlockTable | None] = (None, None),
) -> dict[str, Specialized]:
    """The kernels of one backward pass; those of blocks by name and number.

    dims: D and E; chosen: the operands that want a gradient; tables: by rows and by keys.
    """
    spec = made_for.spec

    def of(kernel: str, its: Tiles, **more: Any) -> Specialized:
        shared = shared_constants(spec, dims, its)
        del shared["HAS_SINK"], shared["EMPTY_ROW"]
        return Specialized(kernel, its, {**shared, "PRECISION": precision, **more})

    def count(sums: Sums, *, in_sink: bool = False) -> int:
        """All of a kind or none: each has its place."""
        found = summed(made_for, sums, in_sink=in_sink)
        return len(found) if any(each.operand in chosen for each in found) else 0

    refined = any(each.operand in chosen and not each.in_sink for each in readings(spec))
    by_rows, by_keys = (
        {"LISTED": each is not None, "FULL_RUN": each is None or each.full_run} for each in tables
    )
    sinks, rows, columns = count(Sums.ROWS, in_sink=True), count(Sums.ROWS), count(Sums.COLUMNS)
    scale = {"PRODUCT_SCALE": spec.scale}
    terms = {
        "SINK_SUMS": sinks,
        "REFINED": refined,
        "MAY_BE_EMPTY": spec.empty_row is not EmptyRow.IMPOSSIBLE,
    }
    found = {
        ROW_TERMS: of(ROW_TERMS, tiles.queries, **terms, **by_rows),
        GRAD_Q: of(GRAD_Q, tiles.queries, ROW_SUMS=rows, **by_rows, **scale),
        GRAD_KV: of(GRAD_KV, tiles.keys, COLUMN_SUMS=columns, **by_keys, **scale),
    }
    for number, each in enumerate(of_blocks(made_for)):
        if each.operand in chosen:
            fixed = {"LOAD": number, "PER_HEAD": each.axis_of(h) is not None, **_signs(each)}
            kernel = GRAD_BIAS if each.sums is Sums.ELEMENTS else GRAD_DISTANCE
            found[f"{kernel} {number}"] = of(kernel, tiles.biases, **fixed)
    return found


def _signs(reading: Reading) -> dict[str, int]:
    """Of q and k in the index of a dense bias."""
    if reading.sums is not Sums.ELEMENTS:
        return {}
    of_q, of_k = (reading.axes[reading.axis_of(position) or 0] for position in (q, k))
    return {"Q_SIGN": of_q.sign, "K_SIGN": of_k.sign}


# -- launches --------------------------------------------------------------------------------------


def _row_terms(
    call: Call, out: torch.Tensor, statistics: torch.Tensor, table: BlockTable | None
) -> torch.Tensor | None:
    """Writes the terms of rows; returns the sums of what the sink reads."""
    batch, heads, rows, _ = call.sizes
    count = call.specialized[ROW_TERMS].constants["SINK_SUMS"]
    sums = call.sums(count, rows) if count else None
    out = with_unit_stride(out)
    call.launch(
        ROW_TERMS,
        call.blocks(ROW_TERMS)[0] * batch * heads,
        out_ptr=out,
        statistics_ptr=statistics.contiguous(),
        sink_sums_ptr=sums,
        sums_step=batch * heads * rows,
        **stride_arguments("o", "bhm", out),
        **table_arguments(table, out.device),
    )
    return sums


def _grad_q(call: Call, table: BlockTable | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch, heads, rows, _ = call.sizes
    grad = laid_out_like(call.like("q"))
    count = call.specialized[GRAD_Q].constants["ROW_SUMS"]
    sums = call.sums(count, rows) if count else None
    call.launch(
        GRAD_Q,
        call.blocks(GRAD_Q)[0] * batch * heads,
        grad_q_ptr=grad,
        row_sums_ptr=sums,
        sums_step=batch * heads * rows,
        **stride_arguments("gq", "bhm", grad),
        **table_arguments(table, grad.device),
    )
    return grad, sums


def _grad_kv(
    call: Call, table: BlockTable | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    batch, heads, _, columns = call.sizes
    grad_k, grad_v = (laid_out_like(call.like(name)) for name in "kv")
    count = call.specialized[GRAD_KV].constants["COLUMN_SUMS"]
    sums = call.sums(count, columns) if count else None
    call.launch(
        GRAD_KV,
        call.blocks(GRAD_KV)[1] * batch * (heads // call.made_for.spec.group),
        grad_k_ptr=grad_k,
        grad_v_ptr=grad_v,
        column_sums_ptr=sums,
        sums_step=batch * heads * columns,
        **stride_arguments("gk", "bgn", grad_k),
        **stride_arguments("gv", "bgn", grad_v),
        **table_arguments(table, grad_k.device),
    )
    return grad_k, grad_v, sums


def _total(operand: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of all places that read an operand, in their order."""
    if not parts:
        return torch.zeros_like(operand, memory_format=torch.contiguous_format)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _with_nan_of_empty_rows(
    spec: AttentionSpec, grad_v: torch.Tensor, statistics: torch.Tensor
) -> torch.Tensor:
    """As autograd has it where a softmax of nothing is NaN: a weight that every value has."""
    if spec.empty_row is not EmptyRow.NAN or spec.sink is not None:
        return grad_v
    empty = statistics[..., 1] == 0
    nan = torch.where(empty, float("nan"), 0.0).sum(2).unflatten(1, (-1, spec.group)).sum(2)
    return torch.add(grad_v, nan[:, :, None, None].to(grad_v.dtype))
