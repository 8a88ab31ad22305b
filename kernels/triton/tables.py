"""Which blocks of keys each block of query rows meets, as the templates read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaattn_compiler.kernels.blocks import BlockStructure


@dataclass(frozen=True)
class BlockTable:
    """For each block of rows: which blocks of keys are wholly attended, and which the mask cuts.

    table: int32 [B|1, H|1, blocks of rows, 4]: the first full block and how many, then the place in
    `blocks` of the first that is cut and how many. blocks: int32, indices of blocks of keys. Where
    the full blocks of some row do not follow each other, they are listed in `blocks` as well, and
    full_run is False.
    """

    table: torch.Tensor
    blocks: torch.Tensor
    full_run: bool


def block_table(structure: BlockStructure, ragged: bool) -> BlockTable:
    """The table of a structure, for every batch item and head alike.

    ragged: the last block of keys has fewer than the others, so that it must be masked.
    """
    full, cut = structure.full.clone(), structure.partial.clone()
    if ragged and full.shape[1]:
        cut[:, -1] |= full[:, -1]
        full[:, -1] = False
    full_count, cut_count = full.sum(-1), cut.sum(-1)
    columns = torch.arange(full.shape[1])
    first = torch.where(full, columns, full.shape[1]).amin(-1) if full.shape[1] else full_count
    last = torch.where(full, columns, -1).amax(-1) if full.shape[1] else full_count
    run = bool(((last - first + 1 == full_count) | (full_count == 0)).all())
    if run:
        full_first = torch.where(full_count > 0, first, 0)
        listed = cut.nonzero()[:, 1]
        before = 0
    else:
        full_first = full_count.cumsum(0) - full_count
        listed = torch.cat([full.nonzero()[:, 1], cut.nonzero()[:, 1]])
        before = int(full_count.sum())
    cut_first = before + cut_count.cumsum(0) - cut_count
    table = torch.stack([full_first, full_count, cut_first, cut_count], -1)
    blocks = listed if len(listed) else torch.zeros(1)
    return BlockTable(table.to(torch.int32)[None, None], blocks.to(torch.int32), run)


def key_table(structure: BlockStructure, ragged: bool) -> BlockTable:
    """The same from the keys' side: which blocks of rows each block of keys meets.

    ragged: the last block of rows has fewer than the others. (Keys beyond the last have results of
    their own, which nobody stores.)
    """
    return block_table(BlockStructure(structure.partial.mT, structure.full.mT), ragged)
