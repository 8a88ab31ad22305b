"""Our generated kernels, launched directly, with what compiled code would keep made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Inputs, Tiling

Attention = Callable[..., Any]


def our_forward(tiling: Tiling) -> Callable[[Case, Inputs], Attention]:
    """The generated kernel, with a table of blocks."""

    def make(case: Case, inputs: Inputs) -> Attention:
        from adaattn_compiler.kernels.triton.launch import forward

        made_for, tiles, table = _configured(case, tiling, inputs)
        how = {"lazy": True} if tiling.lazy else {}

        def attention(q: Any, k: Any, v: Any, *operands: Any) -> Any:
            return forward(made_for, q, k, v, operands, tiles=tiles, table=table, **how)

        return attention

    return make


def our_decode(tiling: Tiling) -> Callable[[Case, Inputs], Attention]:
    """The generated kernels for few rows, with as many splits of the keys as the device is wide."""

    def make(case: Case, inputs: Inputs) -> Attention:
        from adaattn_compiler.kernels.triton.launch import Tiles
        from adaattn_compiler.kernels.triton.launch_decode import decode, splits_for
        from adaattn_compiler.kernels.triton.source import Configuration

        shape = case.shape
        tiles = Tiles(tiling.rows, tiling.keys, tiling.warps, tiling.stages)
        made_for = Configuration(case.form.spec, ("float32",) * case.form.operands)
        width = torch.cuda.get_device_properties(inputs.qkv[0].device).multi_processor_count
        splits = splits_for(shape.batch, shape.kv_heads, shape.columns, width)

        def attention(q: Any, k: Any, v: Any, *operands: Any) -> Any:
            return decode(made_for, q, k, v, operands, splits=splits, tiles=tiles)

        return attention

    return make


def our_backward(tiling: Tiling) -> Callable[[Case, Inputs], Attention]:
    """The generated kernels, forward with this tiling, and backward with tiles of its own."""

    def make(case: Case, inputs: Inputs) -> Attention:
        from adaattn_compiler.kernels.triton.launch import forward
        from adaattn_compiler.kernels.triton.launch_backward import (
            backward,
            backward_tables,
            backward_tiles,
        )

        made_for, tiles, table = _configured(case, tiling, inputs)
        shape, device = case.shape, inputs.qkv[0].device
        theirs = backward_tiles(shape.dim, shape.dim, case.dtype)
        made = backward_tables(case.form.spec, shape.rows, shape.columns, theirs)
        by_rows, by_keys = (_on_device(each, device) for each in made)

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
                statistics = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
                out = forward(
                    made_for, q, k, v, (), tiles=tiles, table=table, statistics=statistics
                )
                ctx.save_for_backward(q, k, v, out, statistics)
                return out

            @staticmethod
            def backward(ctx: Any, grad: Any) -> Any:
                tables = {"table": by_rows, "key_table": by_keys}
                kept = ctx.saved_tensors
                return tuple(backward(made_for, grad, *kept, (), tiles=theirs, **tables))

        both: Any = Attention.apply
        return lambda q, k, v: both(q, k, v)

    return make


def _configured(case: Case, tiling: Tiling, inputs: Inputs) -> tuple[Any, Any, Any]:
    """What the kernel is made for, its tiles, and the table of its blocks."""
    from adaattn_compiler.kernels.blocks import block_structure
    from adaattn_compiler.kernels.triton.launch import Tiles
    from adaattn_compiler.kernels.triton.source import Configuration
    from adaattn_compiler.kernels.triton.tables import block_table

    spec = case.form.spec
    made_for = Configuration(spec, ("float32",) * case.form.operands)
    tiles = Tiles(tiling.rows, tiling.keys, tiling.warps, tiling.stages)
    sizes = (case.shape.rows, case.shape.columns, tiling.rows, tiling.keys)
    ragged = case.shape.columns % tiling.keys != 0
    table = block_table(block_structure(spec.mask, *sizes, ()), ragged=ragged)
    return made_for, tiles, _on_device(table, inputs.qkv[0].device)


def _on_device(table: Any, device: torch.device) -> Any:
    return replace(table, table=table.table.to(device), blocks=table.blocks.to(device))
