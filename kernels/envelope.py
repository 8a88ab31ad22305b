"""Statistics of a call's inputs that guards compare with what a policy was calibrated on.

Cheap beside the attention: of at most `_ROWS` rows of each tensor, evenly spaced. They tell inputs
of another kind (larger, one-hot, all alike), not whether a pattern holds: audits do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_ROWS = 64
# Each of [heads of the tensor]: root mean square; largest magnitude; the share of the mean square
# that is the mean row's (1 where all rows are alike).
MEASURES = ("rms", "max", "mean")
# How far beyond what was seen inputs, and errors, may go.
ROOM = 2.0


def names() -> tuple[str, ...]:
    """The statistics in the order of `guard_statistics`: "q_rms", "q_max", ..., "v_mean"."""
    return tuple(f"{tensor}_{measure}" for tensor in "qkv" for measure in MEASURES)


def widened(name: str, low: Any, high: Any) -> tuple[Any, Any]:
    """The range that a guard lets through, of the one that was seen of a statistic, in numbers or
    arrays: with room; of a share, to the half of what is left to 1."""
    if name.endswith("_mean"):
        return 0.0 * low, high + (1 - high) / 2
    return low / ROOM, high * ROOM


def guard_statistics(
    q_BHMD: torch.Tensor, k_BGND: torch.Tensor, v_BGNE: torch.Tensor
) -> torch.Tensor:
    """[9, B, H], float32, in the order of `names()`; those of a key head for each of its group."""
    group = q_BHMD.shape[1] // max(k_BGND.shape[1], 1)
    found = [_of(q_BHMD)]
    found += [_of(tensor).repeat_interleave(group, -1) for tensor in (k_BGND, v_BGNE)]
    return torch.cat(found)


def by_name(statistics: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """[B,H] by name."""
    return dict(zip(names(), statistics, strict=True))


def _of(tensor: torch.Tensor) -> torch.Tensor:
    """[3, B, heads]."""
    step = -(-tensor.shape[2] // _ROWS)
    some = tensor[:, :, ::step].float()
    square = some.square().mean((-2, -1))
    mean = some.mean(-2).square().mean(-1)
    return torch.stack([square.sqrt(), some.abs().amax((-2, -1)), mean / square.clamp(min=1e-30)])
