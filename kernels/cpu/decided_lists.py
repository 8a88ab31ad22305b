"""The block lists of an attention whose heads are computed as decided, for each pair of lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaattn_compiler.decision import EXACT, HeadDecision
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
    with_exact = None if order is None else order.padded()
    seen = torch.cat([kept, allowed[None]])[None]
    offsets, blocks = lists_by_head(seen, structure.partial, with_exact)
    decided, exact = offsets[:, :-1].contiguous(), offsets[:, -1:].expand(1, len(kept), -1)
    return DecidedLists(structure, kept, decided, exact, blocks, tuple(lists), whole, order)


def order_of(heads: Sequence[HeadDecision], rows: int, columns: int) -> Order | None:
    """In which heads that skip meet their blocks; None where none does."""
    skipping = torch.tensor([head.skip is not None for head in heads])
    return Order(skipping, nearest_first(rows, columns)) if bool(skipping.any()) else None


def decisions_at(
    spec: AttentionSpec,
    heads: Sequence[HeadDecision],
    sizes: tuple[int, int],
    params: Sequence[int],
) -> tuple[tuple[HeadDecision, ...], str]:
    """What the heads do with M rows and N keys, (M, N) the sizes; why where that is not all that
    they are decided to do, else "". `decided_lists` drops the same."""
    rows, columns = sizes
    if rows <= FEW_ROWS:
        return (EXACT,) * len(heads), f"{FEW_ROWS} query rows or fewer are computed exactly"
    sparse = any(head.pattern or head.selection or head.pooling for head in heads)
    if not sparse or sees_itself(spec.mask, *sizes, params):
        return tuple(heads), ""
    why = "query rows are more than keys" if rows > columns else "rows may not see their own keys"
    why += f" with {rows} rows and {columns} keys, patterns are dropped"
    return tuple(_without_pattern(head) for head in heads), why


def _without_pattern(head: HeadDecision) -> HeadDecision:
    return dataclasses.replace(head, pattern=None, selection=None, pooling=None)


def heads_that_become_exact(
    heads: Sequence[HeadDecision], at: Sequence[HeadDecision], mixed: bool
) -> torch.Tensor | None:
    """Whether each head is exact as it does `at` some lengths, and not as decided, bool [H]; None
    where no head is. mixed: whether fewer bits make a difference."""
    bare = [head if mixed else _in_full(head) for head in at]
    became = [now.is_exact and not head.is_exact for head, now in zip(heads, bare, strict=True)]
    changed = any(head != now for head, now in zip(heads, at, strict=True))
    return torch.tensor(became) if changed and any(became) else None


def _in_full(head: HeadDecision) -> HeadDecision:
    return dataclasses.replace(head, scores=EXACT.scores, values=EXACT.values)
