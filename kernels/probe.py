"""A few rows of an attention, exactly, and what a pattern makes of them.

The rows that guards and audits look at: the same result as the kernels', by torch's functions on
[rows, N] scores, on any device, with nothing read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from adaattn_compiler.decision import BLOCK
from adaattn_compiler.kernels.evaluate import evaluate_dense
from adaattn_compiler.spec import AttentionSpec, M, N, S, b, h, k
from adaattn_compiler.spec import q as row


@dataclass(frozen=True)
class Probe:
    """Some rows, computed twice.

    exact: [B,H,R,E], float32 or wider. error: [B,H], of what the kept blocks alone give:
    sqrt(sum |given - exact|^2 / sum |exact|^2) over the rows; 0 where all blocks are kept.
    """

    exact: torch.Tensor
    error: torch.Tensor


def probed_rows(rows: int, count: int, turn: int) -> list[int]:
    """One row of each of `count` equal parts, another one with each turn, all in the end.

    Steps by the golden ratio: of any number of turns in a row the places are spread evenly.
    """
    count = min(count, rows)
    share = (turn * 0.6180339887498949) % 1.0
    return [int((i + share) * rows / count) for i in range(count)]


def probe(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
    at: Sequence[int],
    kept: torch.Tensor | None = None,
) -> Probe:
    """The rows `at` of an attention; kept: bool [H|1, row blocks, key blocks]."""
    wide = torch.promote_types(q_BHMD.dtype, torch.float32)
    places = torch.tensor(at)
    batch, heads, rows, dim = q_BHMD.shape
    kv_heads, columns = k_BGND.shape[1:3]
    few = q_BHMD[:, :, places].to(wide)
    # Query heads of a group are rows of one product.
    grouped = few.reshape(batch, kv_heads, -1, dim)
    products = grouped @ k_BGND.to(wide).transpose(-1, -2) * spec.scale
    scores = _scores(
        products.reshape(batch, heads, -1, columns), operands, params, spec, places, rows
    )
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
    weights = torch.exp(scores - largest)
    sink = _sink(spec, operands, params, places, scores, rows)
    rest = 0.0 if sink is None else torch.exp(sink - largest)
    values = v_BGNE.to(wide)

    def outcome(weights: torch.Tensor) -> torch.Tensor:
        total = weights.sum(-1, keepdim=True) + rest
        sums = weights.reshape(batch, kv_heads, -1, columns) @ values
        return sums.reshape(batch, heads, len(at), -1) / total.clamp(min=torch.finfo(wide).tiny)

    exact = outcome(weights)
    if kept is None:
        return Probe(exact, exact.new_zeros(batch, heads))
    near = kept[:, places // BLOCK].repeat_interleave(BLOCK, -1)[..., :columns]
    return Probe(exact, relative_error(outcome(weights * near), exact))


def relative_error(given: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """[B,H] of [B,H,R,E]; where the exact rows are 0 throughout, infinite unless the given are."""
    wrong = (given - exact).square().sum((-2, -1))
    whole = exact.square().sum((-2, -1))
    return torch.where(wrong == 0, 0.0, (wrong / whole).sqrt())


def _scores(
    products: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
    places: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    values = _positions(products, places, rows)
    values[S] = products
    scores = products
    if spec.score != S:
        scores = evaluate_dense(spec.score, values, operands, params, partial=True)
    if spec.mask == sympy.true:
        return scores
    keep = torch.as_tensor(evaluate_dense(spec.mask, values, operands, params, partial=True))
    return torch.where(keep.bool(), scores, float("-inf"))


def _sink(
    spec: AttentionSpec,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    places: torch.Tensor,
    like: torch.Tensor,
    rows: int,
) -> torch.Tensor | None:
    """The score of the sink, to broadcast to [B,H,R,1]."""
    if spec.sink is None:
        return None
    values = _positions(like, places, rows)
    sink = evaluate_dense(spec.sink, values, operands, params, partial=True)
    return torch.as_tensor(sink, dtype=like.dtype)


def _positions(like: torch.Tensor, places: torch.Tensor, rows: int) -> dict[sympy.Symbol, object]:
    batch, heads, _, columns = like.shape
    return {
        b: torch.arange(batch)[:, None, None, None],
        h: torch.arange(heads)[:, None, None],
        row: places[:, None],
        k: torch.arange(columns),
        M: rows,
        N: columns,
    }
