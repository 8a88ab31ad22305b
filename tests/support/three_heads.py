"""An attention with weights made by hand, whose heads are of three kinds.

Its input [B, N, WIDTH] tells positions, runs of RUN neighbours, and noise (`inputs`). Head 0 looks
at what is near (sparse); the keys of head 1 are those of their run, so that their means stand for
them (low rank); head 2 has keys of noise that nothing stands for (diffuse).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from adaattn_compiler.decision import BLOCK

SPARSE, LOW_RANK, DIFFUSE = range(3)
RUN = BLOCK
HEADS, HEAD_DIM = 3, 32
# Where each part of the input stands: positions, runs, noise.
PLACES, RUNS, NOISE = slice(0, 32), slice(32, 64), slice(64, 96)
WIDTH = 96
LENGTH = 768
# What the queries of each head are multiplied by.
_NEAR, _RUNS, _NOISE = 5.0, 1.5, 1.5


class ThreeHeads(torch.nn.Module):
    """Causal attention; a parameter's rows are the heads'."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM, bias=False)
        part = torch.eye(WIDTH)
        places, runs, noise = part[PLACES], part[RUNS], part[NOISE]
        turned = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=_random(0)))[0]
        rows = [
            *(_NEAR * places, _RUNS * turned @ noise, _NOISE * turned @ noise),
            *(places, runs, noise),
            *(noise, noise, noise.flip(0)),
        ]
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        # The head dimension's root is in the weights.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=HEAD_DIM**-0.5)
        return out.transpose(1, 2).flatten(2)


def inputs(seed: int, rows: int = LENGTH) -> torch.Tensor:
    random = _random(seed)
    # Waves of any length from 40 keys on: near ones agree, far ones do not.
    frequencies = torch.rand(16, generator=_random(1)) * 2 * torch.pi / 40
    angles = torch.arange(rows)[:, None] * frequencies
    places = torch.cat([angles.cos(), angles.sin()], -1)
    runs = torch.randn(-(-rows // RUN), 32, generator=random).repeat_interleave(RUN, 0)[:rows]
    runs = runs + 0.003 * torch.randn(rows, 32, generator=random)
    return torch.cat([places, runs, torch.randn(rows, 32, generator=random)], -1)[None]


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
