"""Scores of some rows of an attention, tile by tile, for what is estimated from a sample.

A tile is some heads by some rows by all keys, and fits a processor's cache: of a whole attention
no more than that exists at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch

from adaattn_compiler.kernels.evaluate import evaluate_dense
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, S, b, h, k
from adaattn_compiler.spec import q as row

# Scores of a tile: a few of its copies fit a second-level cache; a GPU wants more at once.
_TILE, _TILE_ON_GPU = 2**18, 2**25
# A weight of exp(-1000) is 0, in float64 too; -inf times that 0 would be NaN.
_FAINT = -1000.0

# Slices of batch items, heads and the rows that were asked for.
Tile = tuple[slice, slice, slice]


@dataclass(frozen=True)
class ScoredRows:
    """Scores [b,h,r,N] of a tile, -inf where not attended; the sink's broadcasts to [b,h,r,1].

    keep: bool, which keys are attended, broadcasts to [b,h,r,N]; None where all are.
    diagonal: [r], the rows' positions among the keys.
    """

    scores: torch.Tensor
    sink: torch.Tensor | None
    keep: torch.Tensor | None
    diagonal: torch.Tensor

    def weights(self) -> torch.Tensor:
        """softmax, without the sink's column; zeros in a row without a key or a sink."""
        _, weights, rest = exponentials(self.scores, self.sink)
        total = weights.sum(-1, keepdim=True) + rest
        return weights.div_(total.clamp_(min=torch.finfo(weights.dtype).tiny))


def exponentials(
    scores: torch.Tensor, sink: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores - largest, exp of that, exp(sink - largest)); the last [..., 1], 0 without a sink."""
    largest = scores.amax(-1, keepdim=True)
    if sink is not None:
        largest = torch.maximum(largest, sink)
    largest = largest.clamp_(min=torch.finfo(scores.dtype).min)
    shifted = (scores - largest).clamp_(min=_FAINT)
    rest = torch.zeros_like(largest) if sink is None else torch.exp(sink - largest)
    return shifted, shifted.exp(), rest


def scored_rows(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
    at: Sequence[int],
    *,
    together: bool = False,
) -> Iterator[tuple[Tile, ScoredRows]]:
    """The rows `at`, tile by tile, rows outermost; rows without a key attend to all of them, alike,
    where the spec has them UNIFORM. together: a tile holds all rows of its heads.
    """
    places = torch.as_tensor(at, device=q_BHMD.device)
    size = _tile_size(q_BHMD, k_BGND, spec.group, len(at))
    size = (*size[:2], len(at)) if together else size
    given = (q_BHMD, k_BGND, operands, params, spec)
    shared = not spec.mask.has(b, h)
    for first in range(0, len(at), size[2]):
        keep = None
        for batch in range(0, q_BHMD.shape[0], size[0]):
            for head in range(0, q_BHMD.shape[1], size[1]):
                starts = (batch, head, first)
                tile = tuple(slice(s, s + n) for s, n in zip(starts, size, strict=True))
                # The mask of these rows is evaluated once where no head has one of its own.
                keep = keep if shared and keep is not None else _keep(given, tile, places)
                yield tile, _scored(given, tile, places, keep)


_Given = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[int], AttentionSpec]


def _tile_size(q: torch.Tensor, k: torch.Tensor, group: int, rows: int) -> tuple[int, int, int]:
    """Batch items, heads (a multiple or a divisor of a group) and rows of a tile."""
    room = max((_TILE if q.device.type == "cpu" else _TILE_ON_GPU) // k.shape[2], 1)
    if room < rows * group:
        heads = next(
            n for n in range(group, 0, -1) if group % n == 0 and n * rows <= max(room, rows)
        )
        return 1, heads, min(rows, room)
    groups = min(room // (rows * group), k.shape[1])
    return max(room // (rows * q.shape[1]), 1), groups * group, rows


def _keep(given: _Given, tile: Tile, places: torch.Tensor) -> torch.Tensor | None:
    q, key, operands, params, spec = given
    if spec.mask == sympy.true:
        return None
    values = _positions(q, key, tile, places)
    keep = evaluate_dense(spec.mask, values, operands, params, partial=True)
    return torch.as_tensor(keep, device=q.device).bool().expand(*_leading(keep), key.shape[2])


def _leading(keep: object) -> tuple[int, ...]:
    """The axes of a mask before the keys', four in all."""
    shape = keep.shape if isinstance(keep, torch.Tensor) else ()
    return (1,) * (4 - max(len(shape), 1)) + tuple(shape[:-1])


def _scored(
    given: _Given, tile: Tile, places: torch.Tensor, keep: torch.Tensor | None
) -> ScoredRows:
    q, key, operands, params, spec = given
    values = _positions(q, key, tile, places)
    values[S] = scores = _products(q[tile[0], tile[1]][:, :, places[tile[2]]], key, tile, spec)
    if spec.score != S:
        scores = evaluate_dense(spec.score, values, operands, params, partial=True)
        scores = scores.expand(values[S].shape)
    if spec.score.has(Load, -sympy.oo):  # a bias can shut keys out, too
        open_keys = scores != float("-inf")
        keep = open_keys if keep is None else open_keys & keep
    sink = None
    if spec.sink is not None:
        found = evaluate_dense(spec.sink, values, operands, params, partial=True)
        sink = torch.as_tensor(found, dtype=scores.dtype, device=scores.device)
    if keep is not None and spec.empty_row is EmptyRow.UNIFORM and sink is None:
        empty = ~keep.any(-1, keepdim=True)
        keep, scores = keep | empty, torch.where(empty, 0.0, scores)
    if keep is not None:  # by adding: torch.where is an order of magnitude slower
        drop = scores.new_zeros(keep.shape).masked_fill_(~keep, float("-inf"))
        scores = scores + drop
    return ScoredRows(scores, sink, keep, places[tile[2]] + (key.shape[2] - q.shape[2]))


def _products(
    few: torch.Tensor, key: torch.Tensor, tile: Tile, spec: AttentionSpec
) -> torch.Tensor:
    """[b,h,r,N], float32 or wider; the query heads of a group are rows of one product."""
    wide = torch.promote_types(few.dtype, torch.float32)
    first = tile[1].start // spec.group
    groups = max(few.shape[1] // spec.group, 1)
    keys = key[tile[0], first : first + groups].to(wide)
    grouped = few.to(wide).reshape(few.shape[0], groups, -1, few.shape[3]) * spec.scale
    return (grouped @ keys.mT).reshape(*few.shape[:3], -1)


def _positions(
    q: torch.Tensor, key: torch.Tensor, tile: Tile, places: torch.Tensor
) -> dict[sympy.Symbol, object]:
    batch, heads = (
        torch.arange(*part.indices(size), device=q.device)
        for part, size in zip(tile[:2], q.shape[:2], strict=True)
    )
    return {
        b: batch[:, None, None, None],
        h: heads[:, None, None],
        row: places[tile[2], None],
        k: torch.arange(key.shape[2], device=q.device),
        M: q.shape[2],
        N: key.shape[2],
    }
