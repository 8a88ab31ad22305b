"""Which weights dropout keeps, as dropout.h has it: a function of the seed and the place.

What is written out in torch (where something is not finite) leaves out the same weights, so that a
forward pass and its backward agree whichever of the two computes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from adaattn_compiler.kernels.reference import Dropped


def dropped_by_hash(p: float, seed: int, rows: int) -> Dropped | None:
    """Dropout of a strip's weights [B,H,strip,N], of `rows` rows in all; None where p is 0."""
    if p == 0:
        return None

    def dropped(weights: torch.Tensor, first_row: int) -> torch.Tensor:
        batch, heads, strip, columns = weights.shape
        lists = np.arange(batch * heads, dtype=np.uint64).reshape(batch, heads, 1)
        places = lists * np.uint64(rows) + np.arange(strip, dtype=np.uint64) + np.uint64(first_row)
        keys = np.arange(columns, dtype=np.uint32)
        out = torch.from_numpy(_is_dropped(_row_seeds(seed, places), keys, p))
        factor = torch.where(out, 0.0, float(1 / (1 - np.float32(p))))
        return weights * factor.to(weights.dtype)

    return dropped


def _row_seeds(seed: int, places: Any) -> Any:
    z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * (places + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    high = (z >> np.uint64(32)).astype(np.uint32)
    return (z ^ (z >> np.uint64(31))).astype(np.uint32) ^ high


def _is_dropped(seeds: Any, keys: Any, p: float) -> Any:
    z = seeds[..., None] + keys * np.uint32(0x9E3779B9)
    z = (z ^ (z >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    z = (z ^ (z >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    z ^= z >> np.uint32(16)
    return z < np.uint64(float(np.float32(p)) * 2**32)
