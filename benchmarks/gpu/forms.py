"""Attentions, each as its spec, as a model writes it, and as flex_attention wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from adaattn_compiler.spec import AttentionSpec, Load, OperandSpec, S, h, k, q

Modifier = Callable[..., Any]
CAUSAL = sympy.Ge(q - k, 0)
_FLOAT = (OperandSpec("float", 1),)


@dataclass(frozen=True)
class Form:
    """One attention.

    spelling: of q, k, v and the operands. flex_score: of the operands, gives the score_mod.
    attended: the share of (row, key) pairs in the mask, of M and N. operands: how many, each
    [H]. sinks: the operand is each head's logit without a value.
    """

    spec: AttentionSpec
    spelling: Callable[..., torch.Tensor]
    flex_mask: Modifier | None = None
    flex_score: Callable[..., Modifier] | None = None
    attended: Callable[[int, int], float] = lambda rows, columns: 1.0
    operands: int = 0
    sinks: bool = False
    window: int | None = None


def plain(dim: int, group: int = 1) -> Form:
    def spelling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)

    return Form(AttentionSpec(dim**-0.5, group=group), spelling)


def causal(dim: int) -> Form:
    def spelling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    spec = AttentionSpec(dim**-0.5, mask=CAUSAL)
    return Form(spec, spelling, _causal, attended=_below_diagonal)


def windowed(dim: int, width: int) -> Form:
    """The mask made beside the attention and given to SDPA, as transformers does."""

    def spelling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = _in_window(q, width)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Form(
        AttentionSpec(dim**-0.5, mask=_window(width)),
        spelling,
        _flex_window(width),
        attended=_share_of_window(width),
        window=width,
    )


def sinks(dim: int, group: int, width: int) -> Form:
    """As in GPT-OSS: a column of logits beside the scores, dropped after the softmax."""

    def spelling(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor
    ) -> torch.Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * dim**-0.5
        scores = scores.masked_fill(~_in_window(q, width), float("-inf"))
        column = sink.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], -1).softmax(-1, dtype=torch.float32)
        return weights[..., :-1].to(q.dtype) @ v

    spec = AttentionSpec(
        dim**-0.5, mask=_window(width), sink=Load(0, h), operands=_FLOAT, group=group
    )
    share = _share_of_window(width)
    return Form(spec, spelling, _flex_window(width), None, share, 1, sinks=True, window=width)


def softcap(dim: int, group: int, cap: float, width: int | None = None) -> Form:
    """As in Gemma-2, by hand: scores within +-cap, in some layers with a window."""

    def spelling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.tanh(q @ k.transpose(-1, -2) * dim**-0.5 / cap) * cap
        keep = _in_window(q, q.shape[2] if width is None else width)
        scores = scores.masked_fill(~keep, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def flex_score() -> Modifier:
        return lambda score, b, h, q, k: cap * torch.tanh(score / cap)

    mask = CAUSAL if width is None else _window(width)
    share = _below_diagonal if width is None else _share_of_window(width)
    flex_mask = _causal if width is None else _flex_window(width)
    spec = AttentionSpec(dim**-0.5, cap * sympy.tanh(S / cap), mask, group=group)
    return Form(spec, spelling, flex_mask, flex_score, share, window=width)


def alibi(dim: int) -> Form:
    """As in BLOOM, by hand: a slope of each head times the distance of the key."""

    def spelling(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor
    ) -> torch.Tensor:
        place = torch.arange(q.shape[2], device=q.device)
        distance = place[None, :] - place[:, None]
        scores = q @ k.transpose(-1, -2) * dim**-0.5 + slopes[:, None, None] * distance
        scores = scores.masked_fill(distance > 0, float("-inf"))
        weights: torch.Tensor = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return weights @ v

    def flex_score(slopes: torch.Tensor) -> Modifier:
        return lambda score, b, h, q, k: score + slopes[h] * (k - q)

    spec = AttentionSpec(dim**-0.5, S + (k - q) * Load(0, h), CAUSAL, operands=_FLOAT)
    return Form(spec, spelling, _causal, flex_score, _below_diagonal, 1)


# -- masks -----------------------------------------------------------------------------------------


def _window(width: int) -> Any:
    return sympy.And(CAUSAL, sympy.Ge(k - q + width - 1, 0))


def _in_window(q: torch.Tensor, width: int) -> torch.Tensor:
    """[M, M]; True where the key is attended."""
    place = torch.arange(q.shape[2], device=q.device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < width)


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def _flex_window(width: int) -> Modifier:
    return lambda b, h, q, k: (q >= k) & (q - k < width)


def _below_diagonal(rows: int, columns: int) -> float:
    return (rows + 1) / (2 * columns)


def _share_of_window(width: int) -> Callable[[int, int], float]:
    def share(rows: int, columns: int) -> float:
        reach = min(width, rows)
        return (reach * (reach + 1) / 2 + (rows - reach) * reach) / (rows * columns)

    return share
