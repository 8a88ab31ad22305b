"""Attention with a near and a far field in one launch (lowrank.py): what is far, and by what.

Blocks of keys are those of the tiles, of `tiles.keys` keys each; J of them are N keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.kernels.blocks import BlockStructure, block_structure
from adaattn_compiler.kernels.low_rank import pooling_refusal
from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.kernels.triton.launch import (
    Products,
    Tiles,
    broadcast_strides,
    launchable,
    loaded,
    operand_arguments,
    products_of,
    shared_constants,
)
from adaattn_compiler.kernels.triton.source import Configuration, lowrank_source
from adaattn_compiler.kernels.triton.tables import BlockTable, block_table
from adaattn_compiler.spec import AttentionSpec, Refusal


@dataclass(frozen=True)
class FarTable:
    """For each block of rows: which blocks of keys its rows attend to by their centroids.

    table: int32 [B|1, H|1, blocks of rows, 2]: the place in `blocks` of the first, and how many.
    blocks: int32, indices of blocks of keys. Every row of a block must attend to every key of them.
    """

    table: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True)
class Pooled:
    """Centroids of blocks of keys: k [B,G,J,C,D], v [B,G,J,C,E]; C is a power of two.

    log_count: float32 [B,G,J,C], of how many keys each stands for; -inf where it is not used.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_count: torch.Tensor


def pooled(k_BGND: torch.Tensor, v_BGNE: torch.Tensor, block_keys: int, centroids: int) -> Pooled:
    """The means of `centroids` equal runs of keys in each block of `block_keys`, of what is there.

    Summed in float32 or better and rounded to the inputs' type.
    """
    if centroids <= 0 or centroids & (centroids - 1) or block_keys % centroids:
        raise ValueError(f"{centroids} centroids: no power of two that divides {block_keys} keys")
    batch, kv_heads, columns, _ = k_BGND.shape
    blocks, size = -(-columns // block_keys), block_keys // centroids
    starts = torch.arange(blocks * centroids, device=k_BGND.device) * size
    count = (columns - starts).clamp(0, size).reshape(blocks, centroids)

    def means(tensor: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, blocks * block_keys - columns))
        runs = padded.reshape(batch, kv_heads, blocks, centroids, size, tensor.shape[3])
        total = runs.sum(4, dtype=torch.promote_types(tensor.dtype, torch.float32))
        return (total / count.clamp(min=1)[:, :, None]).to(tensor.dtype)

    log_count = count.to(torch.float32).log().expand(batch, kv_heads, blocks, centroids)
    return Pooled(means(k_BGND), means(v_BGNE), log_count)


def near_and_far(
    spec: AttentionSpec,
    rows: int,
    columns: int,
    tiles: Tiles,
    near_blocks: int | Sequence[int],
    params: Sequence[int] = (),
) -> tuple[BlockTable, FarTable]:
    """Tables for M rows and N keys: [1,1], or [1,H] where near_blocks has a number for each head.

    Near are the blocks that the mask cuts, or that it may cut as far as is known without data; and
    whole ones less than `near_blocks` away from the rows' own. Those are where the rows stand among
    the keys, counted from the end, or the nearest that is attended to.
    """
    structure = block_structure(spec.mask, rows, columns, tiles.rows, tiles.keys, params)
    windows = [near_blocks] if isinstance(near_blocks, int) else near_blocks
    away = _blocks_away(structure, rows, columns, tiles)
    window = torch.tensor(windows)[:, None, None]
    far = structure.full & (away >= window)  # [H, Qb, Kb]
    near = structure.full & ~far
    by_rows = BlockStructure(structure.partial.expand_as(near).flatten(0, 1), near.flatten(0, 1))
    table = block_table(by_rows, ragged=columns % tiles.keys != 0)
    by_heads = table.table.unflatten(2, far.shape[:2]).squeeze(0)
    return BlockTable(by_heads, table.blocks, table.full_run), _far_table(far)


def _blocks_away(structure: BlockStructure, rows: int, columns: int, tiles: Tiles) -> torch.Tensor:
    """How far each block of keys is from the rows' own, in blocks, [Qb, Kb]."""
    attended = structure.full | structure.partial
    if not columns:
        return torch.zeros(attended.shape, dtype=torch.int64)
    places = torch.arange(attended.shape[1])
    lowest = torch.where(attended, places, attended.shape[1]).amin(-1)
    highest = torch.where(attended, places, -1).amax(-1)
    first = torch.arange(0, rows, tiles.rows)
    last = (first + tiles.rows - 1).clamp(max=rows - 1)
    own = [
        torch.minimum(torch.maximum((row + columns - rows) // tiles.keys, lowest), highest)
        for row in (first, last)
    ]
    before, after = own[0][:, None] - places, places - own[1][:, None]
    return torch.maximum(before, after).clamp(min=0)


def _far_table(far: torch.Tensor) -> FarTable:
    """Of which blocks are far, [H, Qb, Kb]."""
    count = far.sum(-1)
    first = count.flatten().cumsum(0).reshape(count.shape) - count
    listed = far.nonzero()[:, 2]
    blocks = listed if len(listed) else torch.zeros(1)
    table = torch.stack([first, count], -1)[None]
    return FarTable(table.to(torch.int32), blocks.to(torch.int32))


def fused_lowrank_attention(
    made_for: Configuration,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int] = (),
    *,
    near: BlockTable,
    far: FarTable,
    pooled: Pooled,
    tiles: Tiles,
    precision: str | Products = "ieee",
    lse: torch.Tensor | None = None,
    lazy: bool = False,
    flags: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B,H,M,E], laid out as [B,M,H,E]: attention to near keys, and to the centroids of far ones.

    For query row i of a block of rows whose tables list the blocks Near and Far,

        out_i = (sum_{k in Near, mask(i, k)} e(i, k) v_k + sum_{j in Far, c} e(i, j, c) v_jc) / l_i
        e(i, k) = exp(score(scale q_i k_k))     e(i, j, c) = n_jc exp(score(scale q_i k_jc))

    where l_i is the sum of all e and of the sink's exp. In Far may be what the rows attend to
    wholly and is not in Near; a block in neither is not attended to. `near_and_far` makes such
    tables, `pooled` such centroids: both for tiles of this size. lse: float32 [B,H,M], contiguous,
    to be written: log l_i. lazy: as `launch.forward` has it. flags: int32 [B|1,H|1]; heads whose
    flag is below 0 are left as they are in `out`, which is written where it is given.

    Refusal: for what `pooling_refusal` says. The oracle is `reference.lowrank_attention`.
    """
    reason = pooling_refusal(made_for.spec)
    if reason is not None:
        raise Refusal(reason)
    batch, heads, rows, head_dim = q_BHMD.shape
    columns, value_dim = v_BGNE.shape[2:]
    _check(pooled, columns, tiles)
    q, k_, v = (with_unit_stride(tensor) for tensor in (q_BHMD, k_BGND, v_BGNE))
    k_far, v_far = (with_unit_stride(tensor.flatten(2, 3)) for tensor in (pooled.k, pooled.v))
    log_count = with_unit_stride(pooled.log_count.flatten(2, 3))
    tables = [t.to(q.device) for t in (near.table, near.blocks, far.table, far.blocks)]
    if out is None:
        out = q.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    kernel = launchable(loaded(lowrank_source(made_for)).fused_lowrank_attention)
    kernel[(-(-rows // tiles.rows) * batch * heads,)](
        *(q, k_, v, out, lse, *tables, k_far, v_far, log_count, flags),
        *(stride for tensor in (q, k_, v, out) for stride in tensor.stride()[:3]),
        *(stride for table in (tables[0], tables[2]) for stride in broadcast_strides(table)),
        *(stride for tensor in (k_far, v_far) for stride in tensor.stride()[:3]),
        *log_count.stride()[:2],
        *broadcast_strides(flags),
        *(heads, rows, columns),
        *params,
        *operand_arguments(operands),
        **lowrank_constants(
            made_for.spec,
            (head_dim, value_dim),
            tiles,
            precision,
            centroids=int(pooled.k.shape[3]),
            full_run=near.full_run,
            has_lse=lse is not None,
            has_flags=flags is not None,
            lazy=lazy,
        ),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def _check(pooled: Pooled, columns: int, tiles: Tiles) -> None:
    """That centroids are those of the tiles' blocks; ValueError."""
    blocks, centroids = pooled.k.shape[2], int(pooled.k.shape[3])
    if centroids & (centroids - 1) or tiles.keys % centroids:
        raise ValueError(f"{centroids} centroids: no power of two that divides {tiles.keys} keys")
    if blocks != -(-columns // tiles.keys):
        raise ValueError(f"centroids of {blocks} blocks for {columns} keys in {tiles.keys}s")


def lowrank_constants(
    spec: AttentionSpec,
    dims: tuple[int, int],
    tiles: Tiles,
    precision: str | Products = "ieee",
    *,
    centroids: int,
    full_run: bool = True,
    has_lse: bool = False,
    has_flags: bool = False,
    lazy: bool = False,
) -> dict[str, Any]:
    """What the kernel is specialized for; dims: D and E."""
    products = products_of(precision)
    return {
        **shared_constants(spec, dims, tiles),
        "HAS_LSE": has_lse,
        "HAS_FLAGS": has_flags,
        "QK": products.qk,
        "PV": products.pv,
        "LAZY": lazy,
        "FULL_RUN": full_run,
        "CENTROIDS": centroids,
    }
