"""Scores of some rows of an attention, tile by tile, for what is estimated from a sample.

A tile is some heads by some rows by all keys, and fits a processor's cache: of a whole attention
no more than that exists at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch

from adaattn_compiler.decision import BLOCK
from adaattn_compiler.kernels.evaluate import evaluate_dense
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, S, b, h, k
from adaattn_compiler.spec import q as row

# Scores of a tile: more leave a processor's cache, fewer cost calls; a GPU wants many at once.
_TILE, _TILE_ON_GPU = 2**18, 2**25
# exp of this is the least that is no denormal in float32, with which everything is slow.
_FAINT = -87.0
# exp(x) as 2^(x log2 e), which torch computes three times as fast on CPUs.
_LOG2_E = 1.4426950408889634
# Scores of each row that quantiles are taken of.
OF_A_ROW = 32
_GOLDEN = 0.6180339887498949
# Rows of what takes several tiles are in at least so many, so that a mask that leaves rows fewer
# keys the higher they stand leaves their tiles fewer; each part reads the keys anew.
_PARTS = 2

# Slices of batch items, heads and the rows that were asked for.
Tile = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Attended:
    """Which keys the rows of a tile attend to; both broadcast to [b,h,r,N].

    drop: what is added to scores, 0 or -inf. counts: int32, how many keys up to and with each.
    """

    drop: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class ScoredRows:
    """One tile. finite: its scores [b,h,r,n], with some finite number where keys are shut out;
    n is N, or less: keys after the last that any row of the tile attends to may be left out.

    attended: None where all are. sink: broadcasts to [b,h,r,1], None where there is none.
    diagonal: [r], the rows' positions among the keys.
    """

    finite: torch.Tensor
    attended: Attended | None
    sink: torch.Tensor | None
    diagonal: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """-inf where not attended. By adding: torch.where is an order of magnitude slower."""
        return self.finite if self.attended is None else self.finite + self.attended.drop

    def weights(self) -> torch.Tensor:
        """softmax, without the sink's column; zeros in a row without a key."""
        found = exponentials(self.scores, self.sink)
        total = found.weights.sum(-1, keepdim=True) + found.rest
        # Where there is a key or a sink, the largest of them is exp(0).
        return found.weights.div_(total.masked_fill(total < 0.5, float("inf")))


def sampled_rows(rows: int, count: int, turn: int) -> list[int]:
    """The middle row of each of `count` equal parts (all, if there are no more); with each turn
    another one, by steps of the golden ratio. The first of each would be the rows of a causal mask
    that have the fewest keys."""
    count = min(count, rows)
    share = (0.5 + turn * _GOLDEN) % 1.0
    return [int((i + share) * rows / count) for i in range(count)]


def sampled_places(like: torch.Tensor, rows: int, count: int, turn: int) -> torch.Tensor:
    """int64 [R]: `sampled_rows` on a tensor's device, with nothing copied to it."""
    count = min(count, rows)
    parts = torch.arange(count, dtype=torch.float64, device=like.device)
    return ((parts + (0.5 + turn * _GOLDEN) % 1.0) * rows / count).to(torch.int64)


def sampled_ranks(diagonal: torch.Tensor, turn: int, counts: torch.Tensor) -> torch.Tensor:
    """Which of the keys that rows attend to are looked at, from 1: one of each of OF_A_ROW equal
    parts, int32 [b,h,r,OF_A_ROW]. diagonal: [r]; counts: [b,h,r,1], 0 in rows that do not count."""
    share = ((diagonal + turn) * _GOLDEN) % 1.0
    parts = torch.arange(OF_A_ROW, device=diagonal.device)
    return ((parts + share[:, None].double()) / OF_A_ROW * counts).int() + 1


class Exponentials(NamedTuple):
    """Of scores [..., N]: what softmax divides. The others are [..., 1].

    most: the largest score; shifted: scores less the largest of them and the sink; weights: exp of
    that; rest: the sink's, 0 without one; top: the weight of `most`. Weights are at least
    exp(_FAINT), 1e-38: of masked keys, too, and in rows of nothing else.
    """

    shifted: torch.Tensor
    weights: torch.Tensor
    rest: torch.Tensor
    most: torch.Tensor
    top: torch.Tensor


def exponentials(
    scores: torch.Tensor, sink: torch.Tensor | None = None, into: torch.Tensor | None = None
) -> Exponentials:
    """See Exponentials; sink: broadcasts to [..., 1]. into: what `shifted` is written to; then
    `weights` are written to `scores`, so that large tiles take no more memory."""
    most = scores.amax(-1, keepdim=True)
    largest = most if sink is None else torch.maximum(most, sink)
    largest = largest.clamp(min=torch.finfo(scores.dtype).min)
    shifted = torch.sub(scores, largest, out=into).clamp_(min=_FAINT)
    rest = torch.zeros_like(largest) if sink is None else torch.exp(sink - largest)
    weights = torch.mul(shifted, _LOG2_E, out=None if into is None else scores).exp2_()
    return Exponentials(shifted, weights, rest, most, torch.exp(most - largest))


def scored_rows(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
    at: Sequence[int] | torch.Tensor,
    *,
    together: bool = False,
) -> Iterator[tuple[Tile, ScoredRows]]:
    """The rows `at`, tile by tile, rows outermost; rows without a key attend to all of them, alike,
    where the spec has them UNIFORM. together: a tile holds all rows of its heads.
    """
    places = torch.as_tensor(at, device=q_BHMD.device)
    size = _tile_size(q_BHMD, k_BGND, spec.group, len(at), together)
    given = (q_BHMD, k_BGND, operands, params, spec)
    # The mask of these rows is evaluated once where no head or batch item has one of its own.
    shared = spec.mask != sympy.true and not spec.mask.has(b, h) and not shuts_out(spec)
    for first in range(0, len(at), size[2]):
        rows = slice(first, first + size[2])
        attended = _of_any_head(given, places[rows]) if shared else None
        for batch in range(0, q_BHMD.shape[0], size[0]):
            for head in range(0, q_BHMD.shape[1], size[1]):
                tile = (slice(batch, batch + size[0]), slice(head, head + size[1]), rows)
                yield tile, _scored(given, tile, places, attended)


_Given = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[int], AttentionSpec]


def _tile_size(
    q: torch.Tensor, k: torch.Tensor, group: int, rows: int, together: bool
) -> tuple[int, int, int]:
    """Batch items, heads (a multiple or a divisor of a group) and rows of a tile."""
    room = max((_TILE if q.device.type == "cpu" else _TILE_ON_GPU) // k.shape[2], 1)
    if not together and room < rows * q.shape[0] * q.shape[1]:
        rows = max(rows // _PARTS, 1)
    if room < rows * group:
        most = max(room // rows, 1)
        heads = next(n for n in range(group, 0, -1) if group % n == 0 and n <= most)
        return 1, heads, rows if together else min(rows, room)
    groups = min(room // (rows * group), k.shape[1])
    return max(room // (rows * q.shape[1]), 1), groups * group, rows


def shuts_out(spec: AttentionSpec) -> bool:
    """Whether a bias may be -inf: the mask alone does not tell what is attended."""
    return bool(spec.score.has(Load, -sympy.oo))


def _of_any_head(given: _Given, places: torch.Tensor) -> Attended:
    """By a mask that is the same for all of them; as few keys as rows attend to, where that can be
    told without waiting for a device."""
    q, key, operands, params, spec = given
    positions: dict[sympy.Symbol, torch.Tensor | int] = {
        row: places[:, None],
        k: torch.arange(key.shape[2], device=q.device),
        M: q.shape[2],
        N: key.shape[2],
    }
    found = evaluate_dense(spec.mask, positions, operands, params, partial=True)
    keep = torch.as_tensor(found, device=q.device).bool().expand(len(places), key.shape[2])
    wide = torch.promote_types(q.dtype, torch.float32)
    whole = keep.cumsum(-1, dtype=torch.int32)
    # Rows without a key may yet attend to all.
    if q.device.type == "cpu" and (spec.empty_row is not EmptyRow.UNIFORM or spec.sink is not None):
        last = int(torch.searchsorted(whole, whole[:, -1:].contiguous()).amax())
        used = (last // BLOCK + 1) * BLOCK
        keep, whole = keep[:, :used], whole[:, :used]
    return Attended(_dropped(keep, wide)[None, None], whole[None, None])


def _scored(
    given: _Given, tile: Tile, places: torch.Tensor, attended: Attended | None
) -> ScoredRows:
    """attended: by the mask, where that is known; as many keys as it is of."""
    q, key, operands, params, spec = given
    columns = key.shape[2] if attended is None else attended.drop.shape[-1]
    products = _products(
        q[tile[0], tile[1]][:, :, places[tile[2]]], key[:, :, :columns], tile, spec
    )
    scores = products
    values: dict[sympy.Symbol, torch.Tensor | int] = {}
    if spec.score != S or spec.sink is not None or attended is None:
        values = {**_positions(q, key, tile, places, columns), S: products}
    if spec.score != S:
        scores = evaluate_dense(spec.score, values, operands, params, partial=True)
        scores = torch.as_tensor(scores).to(products).expand(products.shape)
    sink = None
    if spec.sink is not None:
        found = evaluate_dense(spec.sink, values, operands, params, partial=True)
        sink = torch.as_tensor(found, dtype=scores.dtype, device=scores.device)
    keep = None
    if spec.mask != sympy.true and attended is None:
        found = evaluate_dense(spec.mask, values, operands, params, partial=True)
        keep = torch.as_tensor(found, device=q.device).bool()
    if shuts_out(spec):
        finite = scores != float("-inf")
        keep = finite if keep is None else finite & keep
        scores = scores.masked_fill(~finite, 0)
    if keep is not None:
        attended = _attended(keep, columns, scores.dtype)
    if attended is not None and spec.empty_row is EmptyRow.UNIFORM and sink is None:
        attended, scores = _uniform(attended, scores)
    return ScoredRows(scores, attended, sink, places[tile[2]] + (key.shape[2] - q.shape[2]))


def _attended(keep: torch.Tensor, columns: int, dtype: torch.dtype) -> Attended:
    keep = keep.expand(*keep.shape[:-1], columns)[(None,) * (4 - keep.dim())]
    return Attended(_dropped(keep, dtype), keep.cumsum(-1, dtype=torch.int32))


def _dropped(keep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 for True and -inf for False, as logarithms have it."""
    return keep.to(dtype).log_()


def _uniform(attended: Attended, scores: torch.Tensor) -> tuple[Attended, torch.Tensor]:
    """Rows without a key attend to all, with a score of 0."""
    empty = attended.counts[..., -1:] == 0
    if empty.device.type == "cpu" and not empty.any():  # on a GPU it would be waited for
        return attended, scores
    keep = (attended.drop == 0) | empty
    return _attended(keep, scores.shape[-1], scores.dtype), scores.masked_fill(empty, 0)


def _products(
    few: torch.Tensor, key: torch.Tensor, tile: Tile, spec: AttentionSpec
) -> torch.Tensor:
    """[b,h,r,N], float32 or wider; the query heads of a group are rows of one product."""
    wide = torch.promote_types(few.dtype, torch.float32)
    first = tile[1].start // spec.group
    groups = max(few.shape[1] // spec.group, 1)
    keys = key[tile[0], first : first + groups].to(wide)
    grouped = few.to(wide).reshape(few.shape[0], groups, -1, few.shape[3]) * spec.scale
    return torch.matmul(grouped, keys.mT).reshape(*few.shape[:3], -1)


def _positions(
    q: torch.Tensor, key: torch.Tensor, tile: Tile, places: torch.Tensor, columns: int
) -> dict[sympy.Symbol, torch.Tensor | int]:
    batch, heads = (
        torch.arange(*part.indices(size), device=q.device)
        for part, size in zip(tile[:2], q.shape[:2], strict=True)
    )
    return {
        b: batch[:, None, None, None],
        h: heads[:, None, None],
        row: places[tile[2], None],
        k: torch.arange(columns, device=q.device),
        M: q.shape[2],
        N: key.shape[2],
    }
