"""The oracle: attention exactly as its spec says, in plain torch, dense, for any dtype.

Every kernel is held to it in float64. It favours being read over being fast: all scores exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.spec import AttentionSpec, EmptyRow, S


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
) -> torch.Tensor:
    """softmax(score(scale * Q K^T), over the keys in the mask) V.

    q: [B,H,M,D], k: [B,G,N,D], v: [B,G,N,E] with H = G * spec.group; operands and params as the
    spec numbers them. Returns [B,H,M,E] of v's dtype. Dropout is not applied.
    """
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    values = positions((spec.score, spec.mask, spec.sink), q, (batch, heads, rows, columns))
    product = q @ k.repeat_interleave(spec.group, 1).transpose(-1, -2) * spec.scale
    values[S] = product
    scores = evaluate_dense(spec.score, values, operands, params)
    mask = torch.as_tensor(evaluate_dense(spec.mask, values, operands, params), device=q.device)
    mask = mask.expand(batch, heads, rows, columns)
    scores = scores.expand(batch, heads, rows, columns).masked_fill(~mask, float("-inf"))
    if spec.sink is not None:
        sink = torch.as_tensor(
            evaluate_dense(spec.sink, values, operands, params), dtype=scores.dtype
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
