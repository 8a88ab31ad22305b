"""A small GPT over bytes, written as nanoGPT is, and text that every machine has to train it on.

Nothing here knows of AdaAttn: attention is matmul, masked_fill, softmax, matmul.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

CONTEXT = 512


class CausalSelfAttention(nn.Module):
    """Each byte attends to those before it and to itself."""

    past: torch.Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, width)
        past = torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT)
        self.register_buffer("past", past, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.project(x).split(width, 2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        scores = scores.masked_fill(self.past[:, :, :length, :length] == 0, float("-inf"))
        out = F.softmax(scores, dim=-1) @ v
        out = self.leave(out.transpose(1, 2).contiguous().view(batch, length, width))
        return torch.as_tensor(out)


class Block(nn.Module):
    """Attention and an MLP, each added to what it was given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + torch.as_tensor(self.mlp(self.before_mlp(x)))


class TinyGpt(nn.Module):
    """Logits [B, N, 256] of the next byte."""

    def __init__(self, layers: int = 2, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return torch.as_tensor(self.head(self.norm(x)))


def stdlib_text() -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held out): bytes of Python's own library; every 20th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.parts))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(files):
        parts[number % 20 == 0].append(path.read_bytes() + b"\0")
    train, held_out = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, held_out


def batch(text: torch.Tensor, size: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """[size, length + 1] pieces of the text, drawn at random."""
    starts = torch.randint(0, len(text) - length - 1, (size,), generator=generator)
    return torch.stack([text[start : start + length + 1] for start in starts.tolist()]).long()


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next byte, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
