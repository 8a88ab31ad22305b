"""Blocks of keys chosen in each call, by an estimate of the share of weight that they hold.

Two estimates, both of scale * Q K^T alone (what a spec does to the scores is not looked at; audits
tell where that matters):

pooled        the mean query of a row block against the mean key of a key block, as if all keys of
              a block scored alike. Source: Jiang et al., "MInference 1.0", 2024, section 3.2.
antidiagonal  sums of scores along the antidiagonals of tiles of _STRIDE x _STRIDE, each row and key
              in one of them. Source: Xu et al., "XAttention", 2025, section 2.1.

The blocks of a row block are kept from the heaviest on until the estimated share reaches `mass`,
and those of the window and of the first keys always.
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
) -> torch.Tensor:
    """bool [B,H,row blocks,key blocks]; allowed: [row blocks, key blocks], what the mask leaves."""
    estimate = _pooled if selection.by == "pooled" else _antidiagonal
    weights = estimate(q_BHMD, k_BGND, scale, allowed)
    heaviest, order = weights.sort(-1, descending=True)
    before = heaviest.cumsum(-1) - heaviest
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept.scatter_(-1, order, before < selection.mass)
    always = Pattern(selection.window, selection.sinks)
    sizes = (q_BHMD.shape[2], k_BGND.shape[2])
    return (kept | pattern_blocks(always, *sizes, q_BHMD.device)) & allowed


def _pooled(
    q_BHMD: torch.Tensor, k_BGND: torch.Tensor, scale: float, allowed: torch.Tensor
) -> torch.Tensor:
    """The estimated share of each key block in each row block, [B,H,row blocks,key blocks]."""
    rows, keys = _means(q_BHMD, BLOCK), _means(k_BGND, BLOCK)
    scores = _products(rows, keys) * scale
    counts = _counts(k_BGND.shape[2], BLOCK, scores)
    return _softmax(scores + counts.log(), allowed)


def _antidiagonal(
    q_BHMD: torch.Tensor, k_BGND: torch.Tensor, scale: float, allowed: torch.Tensor
) -> torch.Tensor:
    """The same, by antidiagonals: rows of tiles in reverse order against keys of tiles."""
    rows = _tiles(q_BHMD).flip(3).flatten(3)
    keys = _tiles(k_BGND).flatten(3)
    scores = _products(rows, keys) * (scale / _STRIDE)
    each = BLOCK // _STRIDE
    wide = allowed.repeat_interleave(each, 0).repeat_interleave(each, 1)
    wide = wide[: scores.shape[-2], : scores.shape[-1]]
    weights = _softmax(scores, wide)
    by_row = _sums(_sums(weights, each, -1), each, -2)
    return by_row / by_row.sum(-1, keepdim=True).clamp(min=torch.finfo(by_row.dtype).tiny)


def _softmax(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """0 where nothing is allowed."""
    weights: torch.Tensor = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
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
