"""Blocks of keys chosen in each call, by an estimate of the share of weight that they hold.

Two estimates, both of scale * Q K^T alone (what a spec does to the scores is not looked at; audits
tell where that matters):

pooled        the mean query of a row block against the mean key of a key block, as if all keys of
              a block scored alike. Source: Jiang et al., "MInference 1.0", 2024, section 3.2.
antidiagonal  sums of scores along the antidiagonals of tiles of _STRIDE x _STRIDE, each row and key
              in one of them. Source: Xu et al., "XAttention", 2025, section 2.1.

The blocks of a row block are kept from the heaviest on until the estimated share reaches `mass`,
and those of the window and of the first keys always.

Under a mask nothing that comes later may change what a row meets, as it would if rows of a block
chose together. So a row block chooses by the rows up to its first one, as many as it has itself,
among the blocks that the mask leaves whole. Those that it cuts are always kept; what they weigh is
estimated by the keys up to the first row's position.
"""

from __future__ import annotations

import torch

from adaattn_compiler.decision import BLOCK, Pattern, Selection
from adaattn_compiler.kernels.patterns import pattern_blocks

# Rows and keys of a tile whose antidiagonal is summed.
_STRIDE = 16


def selected_blocks(
    selection: Selection,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    scale: float,
    allowed: torch.Tensor,
    whole: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool [B,H,row blocks,key blocks].

    allowed: [row blocks, key blocks], what the mask leaves; whole: those of them that it does not
    cut, None where there is no mask.
    """
    weights, own = estimated(selection.by, q_BHMD, k_BGND, scale, allowed, whole)
    heaviest, order = weights.sort(-1, descending=True)
    before = own[..., None] + heaviest.cumsum(-1) - heaviest
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept.scatter_(-1, order, before < selection.mass)
    if whole is not None:
        kept = kept | ~whole
    always = Pattern(selection.window, selection.sinks)
    sizes = (q_BHMD.shape[2], k_BGND.shape[2])
    return (kept | pattern_blocks(always, *sizes, q_BHMD.device)) & allowed


def estimated(
    by: str,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    scale: float,
    allowed: torch.Tensor,
    whole: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimated share of each key block in each row block, [B,H,row blocks,key blocks], and
    what is left for the blocks that the mask cuts, [B,H,row blocks]."""
    estimate = _pooled if by == "pooled" else _antidiagonal
    if whole is None:
        return estimate(q_BHMD, k_BGND, None, scale, allowed)
    rows, columns = q_BHMD.shape[2], k_BGND.shape[2]
    latest = _up_to(k_BGND, columns - rows, rows)
    return estimate(_up_to(q_BHMD, 0, rows), k_BGND, latest, scale, whole)


def _up_to(tensor: torch.Tensor, offset: int, rows: int) -> torch.Tensor:
    """[B,heads,rows,D]: of which a block from place p on is BLOCK rows of the tensor, the last of
    them at p + offset; zeros where there are none."""
    first = offset - (BLOCK - 1)
    given = tensor[:, :, max(first, 0) : max(first + rows, 0)]
    return torch.nn.functional.pad(given, (0, 0, min(max(-first, 0), rows), 0))[:, :, :rows]


def _pooled(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    latest: torch.Tensor | None,
    scale: float,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """seen: the blocks that take part; latest: [B,G,M,D], keys beside those of each row block."""
    rows, keys = _means(q_BHMD, BLOCK), _means(k_BGND, BLOCK)
    scores = _products(rows, keys) * scale + _counts(k_BGND.shape[2], BLOCK, keys).log()
    scores = scores.masked_fill(~seen, float("-inf"))
    if latest is None:
        return _softmax(scores), rows.new_zeros(scores.shape[:3])
    theirs = _of_heads(_means(latest, BLOCK), rows.shape[1])
    count = _counts(q_BHMD.shape[2], BLOCK, keys).log()
    own = (rows * theirs).sum(-1) * scale + count
    weights = _softmax(torch.cat([scores, own[..., None]], -1))
    return weights[..., :-1], weights[..., -1]


def _antidiagonal(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    latest: torch.Tensor | None,
    scale: float,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, by antidiagonals: rows of tiles in reverse order against keys of tiles."""
    each = BLOCK // _STRIDE
    rows, keys = _tiles(q_BHMD).flip(3).flatten(3), _tiles(k_BGND).flatten(3)
    scores = _products(rows, keys) * (scale / _STRIDE)
    wide = seen.repeat_interleave(each, 0).repeat_interleave(each, 1)
    scores = scores.masked_fill(~wide[: scores.shape[-2], : scores.shape[-1]], float("-inf"))
    if latest is not None:
        theirs = _of_heads(_tiles(latest).flatten(3), rows.shape[1])
        # Of each tile of rows the tiles of keys of its block.
        blocks = [_blocks_of(tiles, each) for tiles in (rows, theirs)]
        own = (blocks[0] @ blocks[1].mT * (scale / _STRIDE)).flatten(2, 3)
        scores = torch.cat([own[:, :, : scores.shape[2]], scores], -1)
    weights = _softmax(scores)
    by_row = _sums(_sums(weights, each, -1), each, -2)
    least = torch.finfo(by_row.dtype).tiny
    by_row = by_row / by_row.sum(-1, keepdim=True).clamp(min=least)
    if latest is None:
        return by_row, by_row.new_zeros(by_row.shape[:3])
    return by_row[..., 1:], by_row[..., 0]


def _of_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B,H,...] of [B,G,...]."""
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _blocks_of(tiles: torch.Tensor, each: int) -> torch.Tensor:
    """[B,heads,blocks,each,x] of [B,heads,tiles,x], zeros where the last block has fewer."""
    padded: torch.Tensor = torch.nn.functional.pad(tiles, (0, 0, 0, -tiles.shape[2] % each))
    blocks: torch.Tensor = padded.unflatten(2, (-1, each))
    return blocks


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """0 where all are -inf."""
    weights: torch.Tensor = scores.softmax(-1)
    return weights.nan_to_num()


def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[B,H,x,y] of rows [B,H,x,D] and keys [B,G,y,D]."""
    batch, heads, count, dim = rows.shape
    grouped = rows.reshape(batch, keys.shape[1], -1, dim)
    products: torch.Tensor = grouped @ keys.mT
    return products.reshape(batch, heads, count, -1)


def _counts(length: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """How many positions each block of an axis has."""
    starts = torch.arange(0, length, size, device=like.device)
    return (length - starts).clamp(max=size).to(like.dtype)


def _means(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Of blocks of `size` rows, the last one as long as it is; float32 or wider."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    counts = _counts(tensor.shape[2], size, wide)
    return _sums(wide, size, -2) / counts[:, None]


def _sums(tensor: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """Sums of `size` neighbours along one of the last two axes, the last ones of what is left."""
    padding = -tensor.shape[axis] % size
    if padding:
        pads = (0, padding) if axis == -1 else (0, 0, 0, padding)
        tensor = torch.nn.functional.pad(tensor, pads)
    sums: torch.Tensor = tensor.unflatten(axis, (-1, size)).sum(axis)
    return sums


def _tiles(tensor: torch.Tensor) -> torch.Tensor:
    """[B,heads,tiles,_STRIDE,D], padded with zeros; float32 or wider."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    padding = -tensor.shape[2] % _STRIDE
    tiles: torch.Tensor = torch.nn.functional.pad(wide, (0, 0, 0, padding))
    return tiles.reshape(*tiles.shape[:2], -1, _STRIDE, tiles.shape[3])
