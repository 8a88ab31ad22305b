"""The oracle: attention exactly as its spec says, in plain torch, dense, for any dtype.

Every kernel is held to it in float64. It favours being read over being fast: all scores exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.spec import AttentionSpec, EmptyRow, S
from adaattn_compiler.spec import q as row


def attention_by_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    strip: int = 256,
) -> torch.Tensor:
    """The same as `reference_attention`, with the scores of a strip of rows at a time.

    In float32 or better, so that half precision is as accurate as a kernel's.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    for start in range(0, q.shape[2], strip):
        part = q[:, :, start : start + strip].to(wide)
        rows = reference_attention(
            part, k.to(wide), v.to(wide), operands, params, spec, (start, q.shape[2])
        )
        out[:, :, start : start + strip] = rows.to(q.dtype)
    return out


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    rows_of: tuple[int, int] | None = None,
) -> torch.Tensor:
    """softmax(score(scale * Q K^T), over the keys in the mask) V.

    q: [B,H,M,D], k: [B,G,N,D], v: [B,G,N,E] with H = G * spec.group; operands and params as the
    spec numbers them. rows_of: (first row, M) where q holds only some of the rows.
    Returns [B,H,M,E] of v's dtype. Dropout is not applied.
    """
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    first, every = rows_of or (0, rows)
    values = positions((spec.score, spec.mask, spec.sink), q, (batch, heads, every, columns))
    if row in values:
        values[row] = values[row][first : first + rows]
    partial = rows_of is not None
    product = q @ k.repeat_interleave(spec.group, 1).transpose(-1, -2) * spec.scale
    values[S] = product
    scores = evaluate_dense(spec.score, values, operands, params, partial=partial)
    mask = torch.as_tensor(
        evaluate_dense(spec.mask, values, operands, params, partial=partial), device=q.device
    )
    mask = mask.expand(batch, heads, rows, columns)
    scores = scores.expand(batch, heads, rows, columns).masked_fill(~mask, float("-inf"))
    if spec.sink is not None:
        sink = torch.as_tensor(
            evaluate_dense(spec.sink, values, operands, params, partial=partial),
            dtype=scores.dtype,
        )
        column = sink.expand(batch, heads, rows, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., :columns].to(v.dtype)
    values_BHNE = v.repeat_interleave(spec.group, 1)
    out = weights @ values_BHNE
    has_key = (scores != float("-inf")).any(-1, keepdim=True)
    return _with_empty_rows(out, has_key, values_BHNE, spec)


def _with_empty_rows(
    out: torch.Tensor, has_key: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Rows that may attend to no key, as the spec has them (with a sink they attend to it)."""
    if spec.sink is not None or spec.empty_row in (EmptyRow.IMPOSSIBLE, EmptyRow.NAN):
        return out
    if spec.empty_row is EmptyRow.ZERO:
        return torch.where(has_key, out, torch.zeros((), dtype=out.dtype))
    return torch.where(has_key, out, v.mean(-2, keepdim=True))
