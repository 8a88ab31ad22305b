"""The block lists of an attention whose heads are computed as decided, for each pair of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaattn_compiler.decision import HeadDecision
from adaattn_compiler.kernels.blocks import BlockStructure, block_structure
from adaattn_compiler.kernels.cpu.parts import Part, PartLists
from adaattn_compiler.kernels.cpu.plans import BLOCK, Order, lists_by_head
from adaattn_compiler.kernels.cpu.runner import FEW_ROWS
from adaattn_compiler.kernels.patterns import kept_blocks, nearest_first, sees_itself
from adaattn_compiler.spec import AttentionSpec


@dataclass(frozen=True)
class DecidedLists:
    """structure: what the mask leaves. kept: of it what the launch of all heads keeps, bool [H, row
    blocks, key blocks]. decided, exact: offsets [1,H,row blocks + 1] of heads with those and of
    exact ones, both places in `blocks`. parts: the lists of each part, none where rows are few.
    whole: whether patterns were dropped, as rows might be left without a key, or are few. order: of
    the blocks of heads that skip."""

    structure: BlockStructure
    kept: torch.Tensor
    decided: torch.Tensor
    exact: torch.Tensor
    blocks: torch.Tensor
    parts: tuple[PartLists, ...]
    whole: bool
    order: Order | None


def decided_lists(
    spec: AttentionSpec,
    heads: Sequence[HeadDecision],
    parts: Sequence[Part],
    sizes: tuple[int, int],
    params: Sequence[int],
) -> DecidedLists:
    """For M rows and N keys, (M, N) the sizes."""
    structure = block_structure(spec.mask, *sizes, *BLOCK, params)
    allowed = structure.partial | structure.full
    few = sizes[0] <= FEW_ROWS  # a part is not for them
    whole = few or not sees_itself(spec.mask, *sizes, params)
    kept = torch.stack([kept_blocks(head, *sizes) for head in heads])
    kept = allowed & (kept | whole)
    lists = []
    for part in parts if not few else ():
        kept, own = part.split(kept, structure, sizes[1])
        lists.append(part.lists(own, structure, sizes[1]))
    # The exact heads' lists after those as decided.
    order = order_of(heads, *sizes)
    every = (
        None if order is None else Order(torch.nn.functional.pad(order.heads, (0, 1)), order.ranked)
    )
    offsets, blocks = lists_by_head(
        torch.cat([kept, allowed[None]])[None], structure.partial, every
    )
    decided, exact = offsets[:, :-1].contiguous(), offsets[:, -1:].expand(1, len(kept), -1)
    return DecidedLists(structure, kept, decided, exact, blocks, tuple(lists), whole, order)


def order_of(heads: Sequence[HeadDecision], rows: int, columns: int) -> Order | None:
    """In which heads that skip meet their blocks; None where none does."""
    skipping = torch.tensor([head.skip is not None for head in heads])
    return Order(skipping, nearest_first(rows, columns)) if bool(skipping.any()) else None
