"""The oracle: attention exactly as its spec says, in plain torch, dense, for any dtype.

Every kernel is held to it in float64. It favours being read over being fast: all scores exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.means import means_of_runs
from adaattn_compiler.kernels.nystrom import landmark_values
from adaattn_compiler.spec import AttentionSpec, EmptyRow, S
from adaattn_compiler.spec import q as row

# Dropout of the weights of some rows, of which the first is given.
Dropped = Callable[[torch.Tensor, int], torch.Tensor]


def attention_by_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    strip: int = 256,
    lse: torch.Tensor | None = None,
    dropped: Dropped | None = None,
) -> torch.Tensor:
    """The same as `reference_attention`, with the scores of a strip of rows at a time.

    In float32 or better, so that half precision is as accurate as a kernel's. lse: [B,H,M], to be
    written.
    """
    wide = _wide(q)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    for start in range(0, q.shape[2], strip):
        part = q[:, :, start : start + strip].to(wide)
        rows, sums = _attention(
            part, k.to(wide), v.to(wide), operands, params, spec, (start, q.shape[2]), dropped
        )
        out[:, :, start : start + strip] = rows.to(q.dtype)
        if lse is not None:
            lse[:, :, start : start + strip] = sums
    return out


def gradients_by_rows(
    grad_out: torch.Tensor,
    qkv: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    wanted: Sequence[bool],
    dropped: Dropped | None = None,
    strip: int = 256,
) -> list[torch.Tensor]:
    """Gradients of q, k, v and of the operands that are wanted, by autograd, strip by strip.

    In a thread of its own: inside an op that autograd called, autograd is off for the thread.
    """
    with ThreadPoolExecutor(1) as thread:
        given = (grad_out, qkv, operands, params, spec, wanted, dropped, strip)
        return thread.submit(_gradients_by_rows, *given).result()


def _gradients_by_rows(
    grad_out: torch.Tensor,
    qkv: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    wanted: Sequence[bool],
    dropped: Dropped | None,
    strip: int,
) -> list[torch.Tensor]:
    wide = _wide(qkv[0])
    q, k, v = (tensor.detach().to(wide).requires_grad_() for tensor in qkv)
    extra = [
        operand.detach().to(wide).requires_grad_() if want else operand
        for operand, want in zip(operands, wanted, strict=True)
    ]
    inputs = [q, k, v, *(operand for operand, want in zip(extra, wanted, strict=True) if want)]
    sums = [torch.zeros_like(tensor) for tensor in inputs]
    for start in range(0, q.shape[2], strip):
        rows = slice(start, start + strip)
        with torch.enable_grad():
            out, _ = _attention(
                q[:, :, rows], k, v, extra, params, spec, (start, q.shape[2]), dropped
            )
        found = torch.autograd.grad(out, inputs, grad_out[:, :, rows].to(wide), allow_unused=True)
        for total, part in zip(sums, found, strict=True):
            if part is not None:
                total += part
    given = [*qkv, *(operand for operand, want in zip(operands, wanted, strict=True) if want)]
    return [total.to(tensor.dtype) for total, tensor in zip(sums, given, strict=True)]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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
    return _attention(q, k, v, operands, params, spec, rows_of)[0]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    rows_of: tuple[int, int] | None = None,
    dropped: Dropped | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, log-sum-exp [B,H,M]); dropped: applied to the weights."""
    scores = _scores(q, k, operands, params, spec, rows_of)
    weights, has_key, sums = _weights(scores, spec)
    weights = weights[..., : k.shape[2]].to(v.dtype)
    if dropped is not None:
        weights = dropped(weights, 0 if rows_of is None else rows_of[0])
    values_BHNE = v.repeat_interleave(spec.group, 1)
    return _with_empty_rows(weights @ values_BHNE, has_key, values_BHNE, spec), sums


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    rows_of: tuple[int, int] | None,
) -> torch.Tensor:
    """[B,H,M,N], -inf outside the mask; with a sink that is one more column."""
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    first, every = rows_of or (0, rows)
    values = positions((spec.score, spec.mask, spec.sink), q, (batch, heads, every, columns))
    if row in values:
        values[row] = values[row][first : first + rows]
    partial = rows_of is not None
    product = q @ k.repeat_interleave(spec.group, 1).transpose(-1, -2) * spec.scale
    values[S] = product
    scores: torch.Tensor = evaluate_dense(spec.score, values, operands, params, partial=partial)
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
    return scores


def _weights(
    scores: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, which rows have a score, log-sum-exp)."""
    has_key = (scores != float("-inf")).any(-1, keepdim=True)
    sums = torch.logsumexp(scores, -1)
    if spec.empty_row is EmptyRow.ZERO:  # such rows have no gradient: not that of NaN
        scores = torch.where(has_key, scores, torch.zeros((), dtype=scores.dtype))
    return torch.softmax(scores, -1), has_key, sums


def _with_empty_rows(
    out: torch.Tensor, has_key: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Rows that may attend to no key, as the spec has them (with a sink they attend to it)."""
    if spec.sink is not None or spec.empty_row in (EmptyRow.IMPOSSIBLE, EmptyRow.NAN):
        return out
    if spec.empty_row is EmptyRow.ZERO:
        return torch.where(has_key, out, torch.zeros((), dtype=out.dtype))
    return torch.where(has_key, out, v.mean(-2, keepdim=True))


def lowrank_attention(
    qkv: Sequence[torch.Tensor],
    centroids: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    near: torch.Tensor,
    far: torch.Tensor,
) -> torch.Tensor:
    """Attention to near keys exactly, and to far blocks of keys by their centroids.

    centroids: k [B,G,J,C,D], v [B,G,J,C,E] and log_count [B,G,J,C] of J blocks of keys. near: bool,
    expands to [B,H,M,N], the keys that rows attend to themselves, of those in the mask. far: bool,
    expands to [B,H,M,J], the blocks whose centroids they attend to,

        score_jc = score(scale * q k_jc) + log_count_jc

    weighed together with the scores of keys and the sink, in one softmax.
    """
    q, k, v = qkv
    k_far, v_far, log_count = (
        tensor.flatten(2, 3).repeat_interleave(spec.group, 1) for tensor in centroids
    )
    keys = _scores(q, k, operands, params, spec, None)
    keys[..., : k.shape[2]].masked_fill_(~near, float("-inf"))
    product = q @ k_far.transpose(-1, -2) * spec.scale
    scores = evaluate_dense(spec.score, {S: product}, operands, params) + log_count[:, :, None]
    every = far.repeat_interleave(centroids[0].shape[3], -1)
    scores = scores.masked_fill(~every, float("-inf")).to(keys.dtype)
    weights, has_key, _ = _weights(torch.cat([scores, keys], -1), spec)
    values = torch.cat([v_far, v.repeat_interleave(spec.group, 1)], 2)
    out = weights[..., : values.shape[2]].to(v.dtype) @ values
    return _with_empty_rows(out, has_key, v.repeat_interleave(spec.group, 1), spec)


def nystrom_attention(
    qkv: Sequence[torch.Tensor], count: int, scale: float, group: int = 1
) -> torch.Tensor:
    """Attention without a mask through `count` landmarks (kernels/nystrom.py), [B,H,M,E].

    Landmarks are the means of runs of ceil(length / count) rows or keys, the last one shorter.
    """
    q, k, v = qkv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q_means, k_means = (means_of_runs(t, -(-t.shape[2] // count)) for t in (q, k))

    def attended(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = (rows @ keys.mT * scale).softmax(-1)
        return weights @ values

    values = landmark_values(q_means, k_means, attended(q_means, k, v), scale)
    return attended(q, k_means, values)


def skipping_attention(
    qkv: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    params: Sequence[Any],
    spec: AttentionSpec,
    met: torch.Tensor,
    skip: torch.Tensor,
    block: tuple[int, int],
    blocks_of_step: int,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention but for blocks of keys whose weights are small: (result, what was skipped).

    met: bool, expands to [B,H,blocks of rows,blocks of keys], the blocks that there are, of `block`
    rows by keys; order: int64 [blocks of rows, blocks of keys], their numbers as they are taken,
    None: ascending; so many of those that a row meets make a step. A row skips a block if

        score_k < max(score_j, j in the keys met up to the end of the block's step) - skip

    for each of its keys k, skip [B,H]. The key of a row's largest score is always kept,
    so that what n skipped keys weigh, relative to what is kept, is at most n exp(-skip).
    Skipped is bool [B,H,M,blocks of keys].
    """
    q, k, v = qkv
    scores = _scores(q, k, operands, params, spec, None)
    (batch, heads, rows), columns, blocks = q.shape[:3], k.shape[2], met.shape[-1]
    seen = met.expand(batch, heads, *met.shape[2:]).repeat_interleave(block[0], 2)[:, :, :rows]
    missing = blocks * block[1] - columns
    padded = torch.nn.functional.pad(scores[..., :columns], (0, missing), value=float("-inf"))
    largest = padded.unflatten(-1, (blocks, block[1])).amax(-1).masked_fill(~seen, float("-inf"))
    if order is None:
        order = torch.arange(blocks).expand(met.shape[2:])
    order = order.repeat_interleave(block[0], 0)[:rows].expand(seen.shape)
    place = seen.gather(-1, order).cumsum(-1).gather(-1, order.argsort(-1)) - 1
    step = place // blocks_of_step
    so_far = torch.stack(
        [
            largest.masked_fill(step > step[..., i : i + 1], float("-inf")).amax(-1)
            for i in range(blocks)
        ],
        -1,
    )
    skipped = seen & (largest < so_far - skip.to(scores.dtype)[..., None, None])
    kept = (seen & ~skipped).repeat_interleave(block[1], -1)[..., :columns]
    scores[..., :columns].masked_fill_(~kept, float("-inf"))
    weights, has_key, _ = _weights(scores, spec)
    values = v.repeat_interleave(spec.group, 1)
    out = weights[..., :columns].to(v.dtype) @ values
    return _with_empty_rows(out, has_key, values, spec), skipped
