"""Runs the kernel for products of rows (rowproducts.py), and puts its parts together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaattn_compiler.kernels.device import target_here
from adaattn_compiler.kernels.scored_rows import sampled_places
from adaattn_compiler.kernels.triton.launch import Tiles, launchable, loaded
from adaattn_compiler.kernels.triton.launch_decode import splits_for
from adaattn_compiler.kernels.triton.launch_statistics import SampledRows, statistics_constants
from adaattn_compiler.kernels.triton.source import row_products_source
from adaattn_compiler.spec import AttentionSpec, EmptyRow


def row_products_by_tiles(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
    *,
    rows: int,
    turn: int,
    tiles: Tiles | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """float32 [B,H,R,R], as `effective_rank.row_products` has them, without waiting for a GPU.

    splits: programs that share the keys of two blocks of rows.
    """
    at = sampled_places(q_BHMD, q_BHMD.shape[2], rows, turn)
    given = SampledRows.of(q_BHMD, k_BGND, operands, params, spec, at)
    batch, heads, count, head_dim = given.few.shape
    if splits is None:
        splits = splits_for(batch, heads, k_BGND.shape[2], target_here().multiprocessors)
    tiles = tiles or row_products_tiles(head_dim, given.few.dtype.itemsize)
    pairs = (-(-count // tiles.rows)) ** 2
    shape = (splits, batch, heads, count)
    products = given.few.new_empty((*shape, count), dtype=torch.float32)
    sums = given.few.new_empty((2, *shape), dtype=torch.float32)
    sink = None if spec.sink is None else given.few.new_empty(shape[1:], dtype=torch.float32)
    kernel = launchable(loaded(row_products_source(given.made_for)).fused_row_products)
    kernel[(splits * pairs * batch * heads,)](
        *(given.few, given.k, given.at, products, sums, sink),
        *given.sizes,
        splits,
        *given.rest,
        **row_products_constants(spec, head_dim, tiles),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    found, empty = _together(products, sums, sink)
    if spec.empty_row is EmptyRow.UNIFORM and sink is None:
        # 1/N for each key, whose products with a row that sums to 1, and with its like, are 1/N.
        either = empty[..., :, None] | empty[..., None, :]
        return torch.where(either, 1.0 / k_BGND.shape[2], found)
    return found


def _together(
    products: torch.Tensor, sums: torch.Tensor, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of softmax's rows, and which rows attend to nothing: zeros."""
    m, total = sums.unbind()
    largest = m.amax(0) if sink is None else torch.maximum(m.amax(0), sink)
    largest = largest.clamp(min=torch.finfo(torch.float32).min)
    factor = torch.where(total == 0, 0.0, m - largest).exp()
    keys = (factor * total).sum(0)
    whole = keys if sink is None else keys + (sink - largest).exp()
    empty = whole == 0
    share = factor / whole.masked_fill(empty, 1.0)
    below = (share[..., :, None] * products * share[..., None, :]).sum(0).tril()
    return below + below.tril(-1).mT, empty


def row_products_tiles(head_dim: int, itemsize: int) -> Tiles:
    """Tiles that compile without spills; itemsize: bytes."""
    return Tiles(64 if itemsize == 2 and head_dim <= 128 else 32, 16, 8, 2)


def row_products_constants(spec: AttentionSpec, head_dim: int, tiles: Tiles) -> dict[str, Any]:
    """What the kernel is specialized for."""
    found = statistics_constants(spec, head_dim, tiles)
    own = {name: found[name] for name in found if name not in ("SHUTS_OUT", "NEAR")}
    return {**own, "WW": "tf32x3"}
