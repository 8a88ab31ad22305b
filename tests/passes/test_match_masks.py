"""Masks in every spelling: what is recovered, and that no row changes its meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from check import run
from spelling import (
    INF,
    SCALE,
    SDPA_ONLY,
    B,
    D,
    E,
    H,
    M,
    N,
    Spelling,
    Spellings,
    check_spelling,
    compare,
    cross,
    lower_triangle,
    scored,
    square,
    weighted,
    with_extra,
)
from torch import nn

from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.spec import EmptyRow

spelling = Spellings()


def is_empty(row):
    """Whether a spec's empty rows are of this kind."""
    return lambda spec: spec.empty_row is row


# -- causal ----------------------------------------------------------------------------------------


@spelling(square, mask="causal")
def masked_fill_of_tril(q, k, v):
    return weighted(scored(q, k).masked_fill(~lower_triangle(N, N), -INF), v)


@spelling(square, mask="causal")
def masked_fill_of_triu(q, k, v):
    return weighted(scored(q, k).masked_fill(torch.triu(torch.ones(N, N), 1) == 1, -INF), v)


@spelling(square, mask="causal")
def masked_fill_of_triu_as_bool(q, k, v):
    return weighted(scored(q, k).masked_fill(torch.triu(torch.ones(N, N), 1).bool(), -INF), v)


@spelling(square, mask="causal")
def masked_fill_in_place(q, k, v):
    s = scored(q, k)
    s.masked_fill_(lower_triangle(N, N).logical_not(), -INF)
    return weighted(s, v)


@spelling(square, mask="causal")
def masked_fill_of_minimum(q, k, v):
    return weighted(scored(q, k).masked_fill(~lower_triangle(N, N), torch.finfo(q.dtype).min), v)


@spelling(square, mask="causal")
def masked_fill_of_a_billion(q, k, v):
    return weighted(scored(q, k).masked_fill(lower_triangle(N, N) == 0, -1e9), v)


@spelling(square, taken=False)
def masked_fill_of_ten_thousand(q, k, v):
    """Too little to shut a key out for sure: it stays what it is, a choice of numbers."""
    return weighted(scored(q, k).masked_fill(~lower_triangle(N, N), -1e4), v)


@spelling(square, mask="none")
def ten_thousand_added(q, k, v):
    return weighted(scored(q, k) + (1.0 - lower_triangle(N, N).float()) * -1e4, v)


@spelling(square, mask="causal")
def where_of_scores(q, k, v):
    return weighted(torch.where(lower_triangle(N, N), scored(q, k), -INF), v)


@spelling(square, mask="causal")
def where_of_a_full_tensor(q, k, v):
    low = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return weighted(torch.where(lower_triangle(N, N), scored(q, k), low), v)


@spelling(square, mask="causal")
def where_the_other_way(q, k, v):
    return weighted(torch.where(~lower_triangle(N, N), torch.tensor(-INF), scored(q, k)), v)


@spelling(square, mask="causal")
def added_triu_of_infinities(q, k, v):
    return weighted(scored(q, k) + torch.triu(torch.full((N, N), -INF), diagonal=1), v)


@spelling(square, mask="causal")
def added_and_filled(q, k, v):
    mask = torch.zeros(N, N).masked_fill(~lower_triangle(N, N), -INF)
    return weighted(scored(q, k) + mask, v)


@spelling(square, mask="causal")
def added_where(q, k, v):
    return weighted(scored(q, k) + torch.where(lower_triangle(N, N), 0.0, -INF), v)


@spelling(square, mask="causal")
def added_in_place(q, k, v):
    s = scored(q, k)
    s += torch.triu(torch.full((N, N), -INF), diagonal=1)
    return weighted(s, v)


@spelling(square, mask="causal")
def added_minimum(q, k, v):
    low = torch.finfo(q.dtype).min
    return weighted(scored(q, k) + (1 - lower_triangle(N, N).to(q.dtype)) * low, v)


@spelling(square, mask="causal")
def added_billion(q, k, v):
    return weighted(scored(q, k) + (1 - torch.ones(N, N).tril()) * -1e9, v)


@spelling(square, mask="causal")
def added_before_the_scale(q, k, v):
    s = q @ k.mT + torch.triu(torch.full((N, N), -INF), diagonal=1)
    return weighted(s / D**0.5, v)


@spelling(square, mask="causal")
def written_over_a_slice(q, k, v):
    """A mask built as transformers once did: full of minima, then triu in place."""
    mask = torch.full((N, N), torch.finfo(q.dtype).min)
    mask = torch.triu(mask, diagonal=1)
    return weighted(scored(q, k) + mask[None, None], v)


@spelling(square, mask="causal")
def mask_filled_by_comparison(q, k, v):
    """As BART and OPT build it."""
    mask = torch.full((N, N), torch.finfo(q.dtype).min)
    place = torch.arange(N)
    mask.masked_fill_(place < (place + 1).view(N, 1), 0)
    return weighted(scored(q, k) + mask, v)


@spelling(square, mask="causal")
def compared_positions(q, k, v):
    place = torch.arange(N)
    return weighted(scored(q, k).masked_fill(place[None, :] > place[:, None], -INF), v)


@spelling(square, mask="causal")
def compared_positions_by_sign_of_distance(q, k, v):
    distance = torch.arange(N).view(-1, 1) - torch.arange(N).view(1, -1)
    return weighted(scored(q, k).masked_fill(distance < 0, -INF), v)


@spelling(square, mask="causal")
def is_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling(square, mask="causal")
def sdpa_with_boolean_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=lower_triangle(N, N))


@spelling(square, mask="causal")
def sdpa_with_float_mask(q, k, v):
    mask = torch.triu(torch.full((N, N), -INF), diagonal=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(mask=f"causal(+{N - M})")
def causal_with_cache_offset(q, k, v):
    row, column = torch.arange(M)[:, None] + (N - M), torch.arange(N)
    return weighted(scored(q, k).masked_fill(column > row, -INF), v)


@spelling(mask=f"causal(+{N - M})")
def causal_with_cache_offset_by_tril(q, k, v):
    keep = torch.tril(torch.ones(M, N), diagonal=N - M)
    return weighted(scored(q, k).masked_fill(keep == 0, -INF), v)


@spelling(mask="causal")
def causal_top_left(q, k, v):
    return weighted(scored(q, k).masked_fill(torch.ones(M, N).tril() == 0, -INF), v)


@spelling(
    lambda: (torch.randn(B, H, N, D), torch.randn(B, H, M, D), torch.randn(B, H, M, E)), mask=None
)
def causal_with_fewer_keys_and_empty_rows(q, k, v):
    keep = torch.ones(N, M, dtype=torch.bool).tril(M - N)
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(
    lambda: tuple(torch.randn(B, N, H * size) for size in (D, D, E)), mask="causal", dynamic=True
)
def causal_dynamic(q, k, v):
    n = q.shape[1]
    q, k, v = (t.view(t.shape[0], n, H, w).transpose(1, 2) for t, w in ((q, D), (k, D), (v, E)))
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(square, mask="causal")
class BufferOfFloats(nn.Module):
    """nanoGPT: a triangle larger than the sequence, cut to it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, q, k, v):
        t = q.shape[2]
        return weighted(scored(q, k).masked_fill(self.bias[:, :, :t, :t] == 0, -INF), v)


@spelling(square, mask="causal")
class BufferOfBooleans(nn.Module):
    """GPT-2: a boolean triangle, and the scores chosen by it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", lower_triangle(16, 16)[None, None], persistent=False)

    def forward(self, q, k, v):
        keep = self.bias[:, :, N - q.shape[2] : N, :N]
        low = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
        return weighted(torch.where(keep, scored(q, k), low), v)


@spelling(mask=f"causal(+{N - M})")
class BufferCutForACache(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bias", lower_triangle(16, 16)[None, None], persistent=False)

    def forward(self, q, k, v):
        m, n = q.shape[2], k.shape[2]
        return weighted(scored(q, k).masked_fill(~self.bias[:, :, n - m : n, :n], -INF), v)


@spelling(square, mask="causal")
class BufferOfInfinities(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((16, 16), -INF).triu_(1))

    def forward(self, q, k, v):
        return weighted(scored(q, k) + self.mask[:N, :N], v)


@spelling(square, mask="causal & window(4)")
class BufferOfABand(nn.Module):
    """GPT-Neo's local attention."""

    def __init__(self):
        super().__init__()
        keep = torch.tril(torch.ones(16, 16, dtype=torch.bool))
        self.register_buffer("bias", keep ^ torch.tril(keep, -4))

    def forward(self, q, k, v):
        return weighted(scored(q, k).masked_fill(~self.bias[:N, :N], -1e9), v)


# -- windows, prefixes, chunks, dilation -----------------------------------------------------------


@spelling(square, mask="causal & window(3)")
def sliding_window(q, k, v):
    row, column = torch.arange(N)[:, None], torch.arange(N)
    keep = (column <= row) & (row - column < 3)
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(square, mask="causal & window(3)")
def sliding_window_by_two_triangles(q, k, v):
    keep = torch.ones(N, N).tril() * torch.ones(N, N).triu(-2)
    return weighted(scored(q, k).masked_fill(keep == 0, -INF), v)


@spelling(square, mask="causal & window(3)")
def sliding_window_of_chosen_minima(q, k, v):
    """As Gemma 2 once had it: the causal mask, and minima over it outside the window."""
    low = torch.finfo(q.dtype).min
    mask = torch.triu(torch.full((N, N), low), diagonal=1)
    outside = torch.tril(torch.ones_like(mask, dtype=torch.bool), diagonal=-3)
    return weighted(scored(q, k) + torch.where(outside, low, mask), v)


@spelling(square, mask=None)
def symmetric_window(q, k, v):
    row, column = torch.arange(N)[:, None], torch.arange(N)
    return weighted(scored(q, k).masked_fill((row - column).abs() > 2, -INF), v)


@spelling(square, mask="causal | prefix(3)")
def prefix(q, k, v):
    row, column = torch.arange(N)[:, None], torch.arange(N)
    keep = (column <= row) | (column < 3)
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(square, mask="causal & chunk(3)")
def chunked(q, k, v):
    row, column = torch.arange(N)[:, None], torch.arange(N)
    keep = (row // 3 == column // 3) & (row >= column)
    return weighted(torch.where(keep, scored(q, k), -INF), v)


@spelling(square, mask="causal & dilated(2)")
def dilated(q, k, v):
    row, column = torch.arange(N)[:, None], torch.arange(N)
    keep = (column <= row) & ((row - column) % 2 == 0)
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(square, mask=None)
def window_and_first_keys(q, k, v):
    """Attention sinks as StreamingLLM has them: a window and the first keys."""
    row, column = torch.arange(N)[:, None], torch.arange(N)
    keep = (column <= row) & ((row - column < 2) | (column < 1))
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(
    with_extra(square, lambda: torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])),
    mask="causal & segment(0)",
)
def segments(q, k, v, ids):
    same = ids[:, None, :, None] == ids[:, None, None, :]
    keep = same & torch.ones(N, N, dtype=torch.bool).tril()
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(
    with_extra(square, lambda: torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1]])),
    mask=None,
)
def segments_from_positions(q, k, v, positions):
    """Packed sequences: a document begins where its positions do."""
    ids = (positions == 0).cumsum(-1)
    keep = (ids[:, None, :, None] == ids[:, None, None, :]) & lower_triangle(N, N)
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


# -- masks that are inputs -------------------------------------------------------------------------


def padding():
    """The first item has all keys, the second four."""
    keep = torch.ones(B, N, dtype=torch.bool)
    keep[1, 4:] = False
    return keep


def padding_with_an_empty_item():
    keep = padding()
    keep[0] = False
    return keep


@spelling(with_extra(cross, padding), mask="key padding", spec=is_empty(EmptyRow.NAN))
def boolean_padding(q, k, v, keep):
    return weighted(scored(q, k).masked_fill(~keep[:, None, None, :], -INF), v)


@spelling(
    with_extra(cross, padding_with_an_empty_item), mask="key padding", spec=is_empty(EmptyRow.NAN)
)
def boolean_padding_and_an_empty_item(q, k, v, keep):
    return weighted(scored(q, k).masked_fill(~keep[:, None, None, :], -INF), v)


@spelling(
    with_extra(cross, padding_with_an_empty_item),
    mask="key padding",
    spec=is_empty(EmptyRow.UNIFORM),
)
def padding_of_minima_and_an_empty_item(q, k, v, keep):
    low = torch.finfo(q.dtype).min
    return weighted(scored(q, k).masked_fill(~keep[:, None, None, :], low), v)


@spelling(
    with_extra(cross, padding_with_an_empty_item),
    mask="key padding",
    spec=is_empty(EmptyRow.UNIFORM),
)
def padding_of_filled_billions_and_an_empty_item(q, k, v, keep):
    return weighted(scored(q, k).masked_fill(~keep[:, None, None, :], -1e9), v)


@spelling(with_extra(cross, lambda: padding_with_an_empty_item().long()), mask="none")
def integer_padding_of_added_minima(q, k, v, keep):
    """As BERT's extended attention mask: integers may be others than 0 and 1, so it is a bias."""
    added = (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return weighted(scored(q, k) + added, v)


@spelling(with_extra(cross, lambda: padding_with_an_empty_item().long()), mask=None)
def integer_padding_of_added_ten_thousands(q, k, v, keep):
    """An empty item is not uniform here: it is as if there were no mask."""
    return weighted(scored(q, k) + (1.0 - keep[:, None, None, :].to(q.dtype)) * -1e4, v)


@spelling(
    with_extra(lambda: cross(torch.float64), lambda: padding_with_an_empty_item().long()), mask=None
)
def integer_padding_of_added_billions_in_float64(q, k, v, keep):
    """A billion and a score differ from a billion in float64: an empty item is not uniform."""
    return weighted(scored(q, k) + (1.0 - keep[:, None, None, :].to(q.dtype)) * -1e9, v)


@spelling(with_extra(cross, lambda: padding_with_an_empty_item().float()), mask=None)
def float_padding_of_added_minima(q, k, v, keep):
    return weighted(scored(q, k) + (1 - keep[:, None, None, :]) * torch.finfo(q.dtype).min, v)


@spelling(with_extra(cross, padding), mask="key padding")
def sdpa_with_padding(q, k, v, keep):
    mask = keep[:, None, None, :].expand(B, 1, M, N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(
    with_extra(cross, padding_with_an_empty_item), mask="key padding", spec=is_empty(EmptyRow.ZERO)
)
def sdpa_with_padding_and_an_empty_item(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])


@spelling(
    with_extra(cross, padding_with_an_empty_item), mask="key padding", spec=is_empty(EmptyRow.ZERO)
)
def masked_again_after_the_softmax(q, k, v, keep):
    """As in espnet: rows without a key become zero."""
    out = ~keep[:, None, None, :]
    weights = torch.softmax(scored(q, k).masked_fill(out, torch.finfo(q.dtype).min), -1)
    return weights.masked_fill(out, 0.0) @ v


@spelling(with_extra(square, padding), mask="causal & key padding", spec=is_empty(EmptyRow.NAN))
def causal_and_padding(q, k, v, keep):
    both = lower_triangle(N, N) & keep[:, None, None, :]
    return weighted(scored(q, k).masked_fill(~both, -INF), v)


@spelling(with_extra(square, padding), mask="causal & key padding", spec=is_empty(EmptyRow.UNIFORM))
def causal_and_padding_of_minima(q, k, v, keep):
    both = lower_triangle(N, N) & keep[:, None, None, :]
    return weighted(torch.where(both, scored(q, k), torch.finfo(q.dtype).min), v)


@spelling(with_extra(square, padding), mask="causal & key padding", spec=is_empty(EmptyRow.NAN))
def filled_twice(q, k, v, keep):
    s = scored(q, k).masked_fill(~lower_triangle(N, N), -INF)
    return weighted(s.masked_fill(~keep[:, None, None, :], -INF), v)


def left_padding():
    """The second item lacks its first keys: with a causal mask its first rows are empty."""
    keep = torch.ones(B, N, dtype=torch.bool)
    keep[1, :3] = False
    return keep


@spelling(
    with_extra(square, left_padding), mask="causal & key padding", spec=is_empty(EmptyRow.UNIFORM)
)
def left_padding_of_filled_minima(q, k, v, keep):
    both = lower_triangle(N, N) & keep[:, None, None, :]
    return weighted(scored(q, k).masked_fill(~both, torch.finfo(q.dtype).min), v)


@spelling(
    with_extra(square, left_padding), mask="causal & key padding", spec=is_empty(EmptyRow.UNIFORM)
)
def left_padding_of_minima_filled_twice(q, k, v, keep):
    low = torch.finfo(q.dtype).min
    s = scored(q, k).masked_fill(~lower_triangle(N, N), low)
    return weighted(s.masked_fill(~keep[:, None, None, :], low), v)


@spelling(with_extra(square, left_padding), taken=False)
def left_padding_of_different_fills(q, k, v, keep):
    """An empty row attends to the keys with the greater of the two numbers."""
    s = scored(q, k).masked_fill(~lower_triangle(N, N), -1e9)
    return weighted(s.masked_fill(~keep[:, None, None, :], torch.finfo(q.dtype).min), v)


@spelling(with_extra(square, left_padding), mask=None)
def left_padding_of_minimum_and_infinity(q, k, v, keep):
    """The causal mask ends a key for good; padding leaves it where nothing else is left."""
    s = scored(q, k).masked_fill(~keep[:, None, None, :], torch.finfo(q.dtype).min)
    return weighted(s.masked_fill(~lower_triangle(N, N), -INF), v)


@spelling(with_extra(square, left_padding), mask=None)
def left_padding_of_two_added_minima(q, k, v, keep):
    """Both added are -inf in float32."""
    low = torch.finfo(q.dtype).min
    causal = torch.triu(torch.full((N, N), low), diagonal=1)
    return weighted(scored(q, k) + causal + (1 - keep[:, None, None, :].float()) * low, v)


@spelling(with_extra(square, left_padding), mask=None)
def left_padding_of_a_filled_and_an_added_minimum(q, k, v, keep):
    """As GPT-2 had it."""
    low = torch.finfo(q.dtype).min
    s = torch.where(lower_triangle(N, N), scored(q, k), torch.full([], low))
    return weighted(s + (1 - keep[:, None, None, :].float()) * low, v)


@spelling(with_extra(square, left_padding), mask="causal & key padding")
def left_padding_of_clamped_infinities(q, k, v, keep):
    """Infinities made finite before the softmax, as OPT has it."""
    low = torch.finfo(q.dtype).min
    s = scored(q, k) + torch.triu(torch.full((N, N), -INF), diagonal=1)
    s = s.masked_fill(~keep[:, None, None, :], -INF)
    return weighted(torch.max(s, torch.tensor(low)), v)


@spelling(with_extra(cross, lambda: torch.randn(B, 1, M, N)), mask="none")
def float_mask(q, k, v, mask):
    return weighted(scored(q, k) + mask, v)


@spelling(with_extra(cross, lambda: torch.randn(M, N)), mask="none")
def float_mask_of_two_dimensions_first(q, k, v, mask):
    return weighted(mask + scored(q, k), v)


@spelling(with_extra(cross, lambda: torch.randn(B, H, M, N)), mask="none")
def float_mask_before_the_scale(q, k, v, mask):
    return weighted((q @ k.mT + mask) * SCALE, v)


@spelling(with_extra(cross, lambda: torch.randn(B, 1, M, N)), mask="none")
def float_mask_subtracted(q, k, v, mask):
    return weighted(scored(q, k) - mask, v)


@spelling(with_extra(cross, lambda: torch.randn(B, 1, M, N)), mask="none")
def sdpa_with_float_input(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(with_extra(cross, lambda: torch.rand(B, 1, M, N) > 0.3), mask="tensor[bqk]")
def boolean_mask(q, k, v, keep):
    return weighted(scored(q, k).masked_fill(~keep, -INF), v)


@spelling(with_extra(cross, lambda: torch.rand(M, N) > 0.3), mask="tensor[qk]")
def boolean_mask_of_two_dimensions(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@spelling(with_extra(cross, lambda: (torch.rand(B, H, M, N) > 0.3).int()), mask="tensor[bhqk]")
def integer_mask(q, k, v, keep):
    return weighted(scored(q, k).masked_fill(keep == 0, -1e9), v)


@spelling(with_extra(cross, lambda: torch.tensor([7, 3])), mask=None)
def lengths(q, k, v, lengths):
    """Key padding from lengths."""
    keep = torch.arange(N) < lengths[:, None]
    return weighted(scored(q, k).masked_fill(~keep[:, None, None, :], -INF), v)


@spelling(
    lambda: (torch.randn(B, H, 1, D), torch.randn(B, H, N, D), torch.randn(B, H, N, E), padding()),
    mask="key padding",
)
def one_query_with_padding(q, k, v, keep):
    return weighted(scored(q, k).masked_fill(~keep[:, None, None, :], -INF), v)


@spelling(
    lambda: (
        torch.randn(B * H, M, D),
        torch.randn(B * H, N, D),
        torch.randn(B * H, N, E),
        padding(),
    ),
    mask="key padding",
)
def folded_heads_with_padding(q, k, v, keep):
    """Batch and heads folded for the product, parted for the mask (as nn.MultiheadAttention)."""
    s = torch.bmm(q * SCALE, k.transpose(1, 2)).view(B, H, M, N)
    s = s.masked_fill(~keep[:, None, None, :], -INF).view(B * H, M, N)
    return torch.bmm(torch.softmax(s, -1), v)


@spelling(
    lambda: (
        torch.randn(B * H, M, D),
        torch.randn(B * H, N, D),
        torch.randn(B * H, N, E),
        padding(),
    ),
    mask=None,
)
def padding_repeated_for_folded_heads(q, k, v, keep):
    added = torch.zeros(B, N).masked_fill(~keep, -INF)
    added = added.view(B, 1, 1, N).expand(-1, H, -1, -1).reshape(B * H, 1, N)
    return torch.bmm(torch.softmax(torch.baddbmm(added, q * SCALE, k.mT), -1), v)


@spelling(with_extra(square, padding), mask=None)
def mask_of_queries_and_keys(q, k, v, keep):
    """An outer product of paddings: rows that are padding are empty."""
    both = keep[:, None, :, None] & keep[:, None, None, :]
    return weighted(scored(q, k).masked_fill(~both, torch.finfo(q.dtype).min), v)


@spelling(lambda: cross(torch.bfloat16), mask=f"causal(+{N - M})")
def minimum_of_bfloat16(q, k, v):
    s = scored(q, k).masked_fill(~lower_triangle(M, N), torch.finfo(q.dtype).min)
    return torch.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v


@spelling(with_extra(lambda: cross(torch.bfloat16), padding_with_an_empty_item), mask=None)
def minimum_of_float32_cast_to_bfloat16(q, k, v, keep):
    """The minimum of float32 is -inf in bfloat16: an empty item is NaN."""
    added = (1.0 - keep[:, None, None, :].float()) * torch.finfo(torch.float32).min
    return weighted(scored(q, k) + added.to(torch.bfloat16), v)


@spelling(with_extra(lambda: cross(torch.float16), padding_with_an_empty_item), mask="key padding")
def minimum_of_float16(q, k, v, keep):
    s = scored(q, k).masked_fill(~keep[:, None, None, :], torch.finfo(q.dtype).min)
    return weighted(s, v)


@spelling.parametrized()
def test_mask_is_recovered_and_kept(spelling: Spelling) -> None:
    check_spelling(spelling)


# -- a buffer may change, a mask may be data -------------------------------------------------------


class _Masked(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", mask)

    def forward(self, q, k, v):
        return weighted(scored(q, k).masked_fill(~self.keep, -INF), v)


def test_buffer_that_is_no_known_mask_stays_a_tensor():
    keep = torch.rand(N, N) > 0.5
    keep.fill_diagonal_(True)
    inputs = square()
    outcome = run(_Masked(keep), *inputs, options=SDPA_ONLY)
    assert [site.mask for site in outcome.sites] == ["tensor[qk]"]
    assert not outcome.analyses[0].assumes
    compare(_Masked(keep), inputs, outcome)


class _Cut(_Masked):
    def forward(self, q, k, v):
        keep = self.keep[: q.shape[2], : k.shape[2]]
        return weighted(scored(q, k).masked_fill(~keep, -INF), v)


def test_part_of_a_buffer_is_read_as_that_part():
    keep = torch.rand(16, 16) > 0.5
    keep.fill_diagonal_(True)
    inputs = square()
    outcome = run(_Cut(keep), *inputs, options=SDPA_ONLY)
    assert [site.mask for site in outcome.sites] == ["tensor[qk]"]
    compare(_Cut(keep), inputs, outcome)


def test_buffer_that_is_nearly_causal_is_not_taken_for_it():
    keep = torch.ones(N, N, dtype=torch.bool).tril()
    keep[0, -1] = True
    inputs = square()
    outcome = run(_Masked(keep), *inputs, options=SDPA_ONLY)
    assert [site.mask for site in outcome.sites] != ["causal"]
    compare(_Masked(keep), inputs, outcome)


def test_buffer_read_as_a_mask_is_assumed():
    outcome = run(_Masked(lower_triangle(N, N)), *square(), options=SDPA_ONLY)
    assert [site.mask for site in outcome.sites] == ["causal"]
    assert outcome.analyses[0].assumes


@pytest.mark.parametrize("rows", [M, 1])
def test_mask_that_shuts_out_nothing_is_none(rows):
    def attention(q, k, v):
        keep = torch.arange(N) < N
        return weighted(scored(q, k).masked_fill(~keep, -INF), v)

    q, k, v = cross()
    outcome = run(attention, q[:, :, :rows], k, v, options=SDPA_ONLY)
    assert [site.mask for site in outcome.sites] == ["none"]
    (lowered,) = outcome.analyses[0].results
    assert isinstance(lowered, Lowered)
    assert lowered.site.spec.empty_row is EmptyRow.IMPOSSIBLE
