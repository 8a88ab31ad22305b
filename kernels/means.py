"""Means of neighbouring rows of [B,heads,length,dim], summed in float32 or wider."""

from __future__ import annotations

import torch


def means_of_runs(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Of each `size` rows, the last run as long as it is: [B,heads,runs,dim] of the same type."""
    whole = tensor.shape[2] // size
    means = _means(tensor[:, :, : whole * size], size)
    rest = tensor[:, :, whole * size :]
    return torch.cat([means, _means(rest, rest.shape[2])], 2) if rest.shape[2] else means


def means_of_any_length(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Of each ceil(length / count) rows, as `means_of_runs` has them, by a form that holds whatever
    the length is: it may be known only at run time."""
    length = tensor.shape[2]
    size = -(-length // count)
    runs = -(-length // size)
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, runs * size - length))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    sums = padded.unflatten(2, (runs, size)).sum(3, dtype=wide)
    starts = torch.arange(runs, device=tensor.device) * size
    means: torch.Tensor = sums / (length - starts).clamp(max=size)[:, None]
    return means.to(tensor.dtype)


def means_of_whole_runs(tensor: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """Of the runs of `size` rows that are whole, then zeros: [B,heads,count,dim]."""
    whole = min(tensor.shape[2] // size, count)
    means = tensor.new_zeros(*tensor.shape[:2], count, tensor.shape[3])
    means[:, :, :whole] = _means(tensor[:, :, : whole * size], size)
    return means


def _means(tensor: torch.Tensor, size: int) -> torch.Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    means: torch.Tensor = tensor.unflatten(2, (-1, size)).mean(3, dtype=wide)
    return means.to(tensor.dtype)
