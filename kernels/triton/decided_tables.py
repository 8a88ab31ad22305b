"""What decisions need on a device: numbers and bases by head, and the blocks that heads meet.

Made on the host once for a plan (or a pair of lengths) and kept on the device, so that no call
waits for the host: the ops here copy on the device what is kept. Where blocks are listed, each row
of blocks has room for all of them, so that shapes follow from the lengths, whatever is listed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaattn_compiler.decision import BLOCK, HeadDecision, KeyBasis
from adaattn_compiler.kernels.blocks import BlockStructure, block_structure
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.on_device import kept_on_device
from adaattn_compiler.kernels.patterns import (
    kept_blocks,
    nearest_first,
    pattern_blocks,
    sees_itself,
)
from adaattn_compiler.kernels.triton.decided_plan import GpuDecisions, decisions_of
from adaattn_compiler.kernels.triton.launch_lowrank import FarTable
from adaattn_compiler.kernels.triton.tables import BlockTable

# Plans, and lengths of plans, that are kept: each some kilobytes, some megabytes.
_KEPT_NUMBERS, _KEPT_TABLES = 4096, 1024
# Plans that were read; they are while a graph is traced.
_KEPT_PLANS = 256

# Rows of what `decided_numbers` gives, as slices; each has a column by head.
LOW, HIGH = slice(0, 9), slice(9, 18)
LIMIT, BUDGET, WAY, SELECTION = 18, 19, 20, 21
LARGEST, SKIP = slice(22, 25), 25
_ROWS = 26


def is_wide(tensor: torch.Tensor) -> bool:
    """Whether products may be of fewer bits than a tensor has."""
    return tensor.dtype == torch.float32


@torch.library.custom_op("adaattn::decided_numbers", mutates_args=())
def decided_numbers(like: torch.Tensor, numbers: str) -> torch.Tensor:
    """A plan's numbers (`numbers_of`), float64 [26,H], on the device of a tensor: rows as they are
    named above."""
    return _numbers(like.device)(numbers)[0].clone()


@decided_numbers.register_fake
def _fake_numbers(like: torch.Tensor, numbers: str) -> torch.Tensor:
    return like.new_empty((_ROWS, len(json.loads(numbers)[0])), dtype=torch.float64)


def _numbers_made(numbers: str) -> tuple[torch.Tensor]:
    return (torch.tensor(json.loads(numbers), dtype=torch.float64),)


_numbers = kept_on_device(_KEPT_NUMBERS, _numbers_made)


@functools.lru_cache(maxsize=_KEPT_PLANS)
def numbers_of(plan: str, wide: bool) -> str:
    """As JSON, for tensors that are float32 or not: shorter than a plan; each call hands it on."""
    found = decisions_of(plan, wide)
    decided = found.plan
    chosen = [
        found.selections.index(head.selection) if head.selection is not None else -1
        for head in decided.heads
    ]
    rows = (*decided.low, *decided.high, decided.limit, decided.budgets)
    skip = [float("inf") if head.skip is None else head.skip for head in decided.heads]
    return json.dumps((*rows, found.of_heads, chosen, *found.largest, skip))


# -- bases -----------------------------------------------------------------------------------------


@torch.library.custom_op("adaattn::decided_bases", mutates_args=())
def decided_bases(like: torch.Tensor, bases: str) -> list[torch.Tensor]:
    """A plan's bases (`bases_of`) by rank, ascending: of query heads [H,D,rank], 0 where a head has
    none of that rank, and of key heads [G,D,rank]; of a tensor's type, on its device."""
    return [basis.clone() for basis in _bases(like.device)(bases, like.dtype)]


@decided_bases.register_fake
def _fake_bases(like: torch.Tensor, bases: str) -> list[torch.Tensor]:
    return [
        like.new_empty((len(places), like.shape[-1], rank))
        for rank, of_heads, of_keys, _ in json.loads(bases)
        for places in (of_heads, of_keys)
    ]


def _bases_made(bases: str, dtype: torch.dtype) -> list[torch.Tensor]:
    made: list[torch.Tensor] = []
    for rank, of_heads, of_keys, matrices in json.loads(bases):
        each = [KeyBasis(rank, matrix).tensor() for matrix in matrices]
        every = torch.stack([*each, torch.zeros_like(each[0])])  # the last one: none
        made += [every[places].to(dtype) for places in (of_heads, of_keys)]
    return made


_bases = kept_on_device(_KEPT_TABLES, _bases_made)


@functools.lru_cache(maxsize=_KEPT_PLANS)
def bases_of(plan: str, wide: bool) -> str:
    """As JSON: for each rank (rank, places of query heads, places of key heads, matrices, each
    once). Heads that share keys have one basis, those of them that have any; else ValueError."""
    found = decisions_of(plan, wide)
    group = found.attention.made_for.spec.group
    every = []
    for rank in found.ranks:
        bases = [_of_rank(head, rank) for head in found.plan.heads]
        matrices = list(dict.fromkeys(matrix for matrix in bases if matrix is not None))
        places = [-1 if matrix is None else matrices.index(matrix) for matrix in bases]
        groups = [set(places[i : i + group]) - {-1} for i in range(0, len(places), group)]
        if any(len(each) > 1 for each in groups):
            raise ValueError(f"heads that share keys have several bases of rank {rank}")
        every.append((rank, places, [max(each, default=-1) for each in groups], matrices))
    return json.dumps(every)


def _of_rank(head: HeadDecision, rank: int) -> str | None:
    return head.basis.matrix if head.basis is not None and head.basis.rank == rank else None


@functools.lru_cache(maxsize=_KEPT_PLANS)
def without_bases(plan: str) -> str:
    """The plan as far as its tables go: with bases it is long, and each call hands it on."""
    found = DecidedPlan.deserialize(plan)
    if all(head.basis is None for head in found.heads):
        return plan
    heads = tuple(dataclasses.replace(head, basis=None) for head in found.heads)
    return dataclasses.replace(found, heads=heads).serialize()


# -- lists of blocks -------------------------------------------------------------------------------


def lists_of(
    seen: torch.Tensor, cut: torch.Tensor, ranked: torch.Tensor | None = None
) -> BlockTable:
    """Lists of the blocks seen, bool [B,H,Qb,Kb], of which those in `cut` [Qb,Kb] are masked.

    ranked: int64 [Qb,Kb], the numbers of blocks in the order in which whole ones are met; None:
    ascending.
    """
    whole, masked = seen & ~cut, seen & cut
    blocks = seen.shape[-1]
    index = torch.arange(blocks, device=seen.device, dtype=torch.int32)
    rank = index if ranked is None else ranked.argsort(-1).to(torch.int32)
    # Whole ones first, then masked ones, then those that are not there.
    order = torch.where(whole, rank, index + torch.where(masked, blocks, 2 * blocks))
    listed = order.argsort(-1).to(torch.int32).flatten()
    counts = [each.sum(-1, dtype=torch.int32) for each in (whole, masked)]
    lines = counts[0].numel()
    first = torch.arange(lines, device=seen.device, dtype=torch.int32).reshape(counts[0].shape)
    first = first * blocks
    table = torch.stack([first, counts[0], first + counts[0], counts[1]], -1)
    return BlockTable(table, listed, full_run=False)


def spread(blocks: torch.Tensor, tile: tuple[int, int], counts: tuple[int, int]) -> torch.Tensor:
    """Blocks of BLOCK rows and keys [...,x,y] as those of tiles, of which there are so many. A tile
    of several blocks has what any of them has."""
    for axis, size, count in zip((-2, -1), tile, counts, strict=True):
        if size < BLOCK:
            blocks = blocks.repeat_interleave(BLOCK // size, axis).narrow(axis, 0, count)
        elif size > BLOCK:
            missing = count * (size // BLOCK) - blocks.shape[axis]
            room = (0, missing) if axis == -1 else (0, 0, 0, missing)
            padded = torch.nn.functional.pad(blocks, room)
            blocks = padded.unflatten(axis, (count, size // BLOCK)).any(axis)
    return blocks


def tile_counts(found: GpuDecisions, rows: int, columns: int) -> tuple[int, int]:
    """How many tiles rows and keys make."""
    tiles = found.attention.tiles
    return -(-rows // tiles.rows), -(-columns // tiles.keys)


@torch.library.custom_op("adaattn::decided_tables", mutates_args=())
def decided_tables(
    like: torch.Tensor, rows: int, columns: int, params: Sequence[int], plan: str
) -> list[torch.Tensor]:
    """The tables of M rows and N keys on the device of a tensor, in the order of `table_shapes`, of
    a plan `without_bases`."""
    kept = _tables(like.device)(plan, is_wide(like), (rows, columns), tuple(params))
    return [table.clone() for table in kept]


@decided_tables.register_fake
def _fake_tables(
    like: torch.Tensor, rows: int, columns: int, params: Sequence[int], plan: str
) -> list[torch.Tensor]:
    shapes = table_shapes(decisions_of(plan, is_wide(like)), rows, columns)
    return [like.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values()]


def table_shapes(
    found: GpuDecisions, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each table that there is, by name; tensors are in this order.

    exact, fixed, near: `BlockTable`s of heads that are exact, that have patterns or skip, and of
    what is near where means stand for the rest; far: the `FarTable` of that. Where blocks are
    chosen in a call: what heads meet otherwise (kept), what the mask leaves (allowed) and what of
    it it does not cut (whole), in blocks of BLOCK; where nothing may be left out (forced); and of
    tiles those that the mask leaves (tiles) or cuts.
    """
    counts = tile_counts(found, rows, columns)
    lines, heads = counts[0] * counts[1], len(found.of_heads)
    whole, masks = torch.int32, torch.bool
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def listed(name: str, patterns: int, heads: int, width: int = 4) -> None:
        shapes[f"{name}_table"] = ((1, heads, counts[0], width), whole)
        shapes[f"{name}_blocks"] = ((patterns * lines,), whole)

    if found.attention.listed:
        listed("exact", 1, 1)
    if found.selections:
        shapes["kept"] = ((heads, *blocks), masks)
        shapes |= dict.fromkeys(("allowed", "whole", "forced"), (blocks, masks))
        shapes |= dict.fromkeys(("tiles", "cut"), (counts, masks))
    elif found.patterned or found.skips:
        listed("fixed", len(_kinds(found, "pattern")), heads)
    if found.pools:
        kinds = len(_kinds(found, "pooling"))
        listed("near", kinds, heads)
        listed("far", kinds, heads, 2)
    return shapes


def _kinds(found: GpuDecisions, part: str) -> dict[Any, int]:
    """The patterns or poolings of heads (None: none), each with a number."""
    every = dict.fromkeys(getattr(head, part) for head in found.plan.heads)
    return {kind: number for number, kind in enumerate(every)}


def _tables_made(
    plan: str, wide: bool, sizes: tuple[int, int], params: tuple[int, ...]
) -> list[torch.Tensor]:
    found = decisions_of(plan, wide)
    made = tables_by_name(found, *sizes, params)
    return [made[name] for name in table_shapes(found, *sizes)]


_tables = kept_on_device(_KEPT_TABLES, _tables_made)


def tables_by_name(
    found: GpuDecisions, rows: int, columns: int, params: tuple[int, ...]
) -> Mapping[str, torch.Tensor]:
    """All that there may be, on the CPU."""
    tiles, mask = found.attention.tiles, found.attention.made_for.spec.mask
    structure = block_structure(mask, rows, columns, BLOCK, BLOCK, params)
    of_tiles = block_structure(mask, rows, columns, tiles.rows, tiles.keys, params)
    left, cut = of_tiles.partial | of_tiles.full, of_tiles.partial.clone()
    if columns % tiles.keys:
        cut[:, -1] = left[:, -1]
    counts = tile_counts(found, rows, columns)
    forced = not sees_itself(mask, rows, columns, params)
    allowed = structure.partial | structure.full

    def in_tiles(blocks: torch.Tensor) -> torch.Tensor:
        return spread(blocks, (tiles.rows, tiles.keys), counts) & left

    def by_kind(
        part: str, blocks: Sequence[torch.Tensor], ranked: torch.Tensor | None = None
    ) -> BlockTable:
        seen = in_tiles(torch.stack(list(blocks)))[None]
        return _by_head(found, part, lists_of(seen, cut, ranked))

    every = [HeadDecision(pattern=pattern) for pattern in _kinds(found, "pattern")]
    patterns = [kept_blocks(each, rows, columns) for each in every]
    near = _near(found, structure, (rows, columns), forced)
    far = [structure.full & ~blocks for blocks in near]
    of_far = by_kind("pooling", far)
    heads = torch.stack([kept_blocks(head, rows, columns) for head in found.plan.heads])
    ranked = nearest_first(rows, columns, (tiles.rows, tiles.keys)) if found.skips else None
    lists: dict[str, BlockTable | FarTable] = {
        "exact": lists_of(left[None, None], cut),
        "fixed": by_kind("pattern", [allowed & (blocks | forced) for blocks in patterns], ranked),
        "near": by_kind("pooling", near),
        "far": FarTable(_far_lines(of_far.table), of_far.blocks),
    }
    return {
        **{f"{name}_table": each.table for name, each in lists.items()},
        **{f"{name}_blocks": each.blocks for name, each in lists.items()},
        "kept": allowed & (heads | forced),
        "allowed": allowed,
        "whole": structure.full,
        "forced": allowed if forced else torch.zeros_like(allowed),
        "tiles": left,
        "cut": cut,
    }


def _near(
    found: GpuDecisions, structure: BlockStructure, sizes: tuple[int, int], forced: bool
) -> list[torch.Tensor]:
    """By pooling what is met key by key: besides the pattern what the mask cuts, and all where
    nothing may be left out."""
    allowed = structure.partial | structure.full
    return [
        allowed
        if forced or pooling is None
        else structure.partial | (allowed & pattern_blocks(pooling.near, *sizes))
        for pooling in _kinds(found, "pooling")
    ]


def _far_lines(table: torch.Tensor) -> torch.Tensor:
    """Lines of two numbers: the first block, and how many; a ragged last one counts as the rest."""
    return torch.stack([table[..., 0], table[..., 1] + table[..., 3]], -1)


def _by_head(found: GpuDecisions, part: str, lists: BlockTable) -> BlockTable:
    """Of lists by kind [1,P,...] those by head [1,H,...]."""
    kinds = _kinds(found, part)
    places = [kinds[getattr(head, part)] for head in found.plan.heads]
    return BlockTable(lists.table[:, places].contiguous(), lists.blocks, lists.full_run)
