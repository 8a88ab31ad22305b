"""Attention as models write it, in plain torch: what the cases run that are not from transformers.

Each takes the three projections in one tensor [B, N, 3 H D], as a fused Linear leaves them, so that
views and transposes around the attention are those of a real model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def heads_of(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """q, k and v, each [B, H, N, D], as views of [B, N, 3 H D]."""
    batch, length, width = qkv.shape
    shape = (batch, length, heads, width // (3 * heads))
    return tuple(part.view(shape).transpose(1, 2) for part in qkv.split(width // 3, dim=2))


def joined(out_BHME: torch.Tensor) -> torch.Tensor:
    """[B, M, H E]."""
    return out_BHME.transpose(1, 2).contiguous().flatten(2)


class MaskedFillCausal(nn.Module):
    """GPT-2's and nanoGPT's: a buffer of ones below the diagonal, masked_fill, softmax."""

    mask: torch.Tensor

    def __init__(self, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        ones = torch.ones(length, length).tril().view(1, 1, length, length)
        self.register_buffer("mask", ones, persistent=False)

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = heads_of(qkv, self.heads)
        length = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        return joined(F.softmax(scores, dim=-1) @ v)


class PlainSoftmax(nn.Module):
    """Attention over all keys, by hand."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = heads_of(qkv, self.heads)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        return joined(F.softmax(scores, dim=-1) @ v)


class SdpaCausal(nn.Module):
    """A model that already calls the best that torch has."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = heads_of(qkv, self.heads)
        return joined(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Trained(nn.Module):
    """An attention of parameters, summed against fixed weights: forward, backward, little else."""

    towards: torch.Tensor

    def __init__(self, attention: nn.Module, qkv: torch.Tensor) -> None:
        super().__init__()
        self.attention, self.qkv = attention, nn.Parameter(qkv)
        out = torch.randn(*qkv.shape[:-1], qkv.shape[-1] // 3)
        self.register_buffer("towards", out, persistent=False)

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = (self.attention(self.qkv) * self.towards).sum()
        return loss


class GroupedDecode(nn.Module):
    """The same by SDPA, several query heads to each head of the cache."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


class Decode(nn.Module):
    """One new token beside a cache of keys and values."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        return joined(F.softmax(scores, dim=-1) @ v)


class Block(nn.Module):
    """nanoGPT's block."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention = MaskedFillCausal(heads, length)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.leave(self.attention(self.project(self.before_attention(x))))
        return x + self.mlp(self.before_mlp(x))


class Gpt(nn.Module):
    """A whole GPT over bytes; with `targets`, its loss."""

    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, length) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
