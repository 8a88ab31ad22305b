"""Heads whose scores are of other rows or keys than there are: in a basis of keys, by landmarks.

What kernels/cpu/parts.py does for them, by the launches of forward.py and torch functions between
them, that never wait for the device; lengths may be known only at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from adaattn_compiler.kernels.means import means_of_any_length
from adaattn_compiler.kernels.nystrom import landmark_values
from adaattn_compiler.kernels.triton.decided_plan import Way
from adaattn_compiler.kernels.triton.launch import Alternative, forward
from adaattn_compiler.kernels.triton.plan import TritonPlan

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def turned(rows: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """[B,H,M,rank] of [B,H,M,D], by head; bases [H,D,rank], of the same type."""
    return torch.einsum("bhmd,hdr->bhmr", rows, bases)


def through_landmarks(
    plan: TritonPlan,
    qkv: Tensors,
    way: Way,
    heads: Sequence[int],
    flags: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write heads to `out` [B,H,M,E]; which of them had values too large or NaN, bool [B,H].

    plan: of the exact attention, without mask, bias and sink. heads: the numbers of the way's;
    flags: int32 [B,H], above 0 where they are computed. Landmarks of rows get what they get
    exactly; as keys, those of keys are met by all rows, with values of each query head.
    """
    q, k, v = qkv
    made_for, every = plan.made_for, range(q.shape[1])
    of_keys = [head // made_for.spec.group for head in every]
    there = Alternative(torch.where(flags > 0, 0, -1).to(torch.int32))
    q_means, k_means = (means_of_any_length(tensor, way.landmarks) for tensor in (q, k))
    exact = forward(
        made_for,
        q_means,
        k,
        v,
        (),
        tiles=plan.tiles,
        precision=plan.precision,
        alternative=there,
    )
    values = landmark_values(
        _heads(q_means, heads),
        _heads(k_means, [of_keys[head] for head in heads]),
        _heads(exact, heads),
        made_for.spec.scale,
    )
    # Other heads are absent: what stands for them is not read.
    places = [heads.index(head) if head in heads else 0 for head in every]
    forward(
        dataclasses.replace(made_for, spec=dataclasses.replace(made_for.spec, group=1)),
        q,
        _heads(k_means, of_keys),
        _heads(values, places),
        (),
        tiles=plan.tiles,
        precision=way.products,
        alternative=there,
        out=out,
    )
    fits = (values.abs() <= _largest(way, values.dtype)).flatten(2).all(-1)
    return (flags > 0) & ~_heads(fits, places)


def _heads(tensor: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Some heads of [B,heads,...], in this order: what indices on the host would have to copy."""
    if list(places) == list(range(tensor.shape[1])):
        return tensor
    return torch.stack([tensor[:, place] for place in places], 1)


def _largest(way: Way, dtype: torch.dtype) -> float:
    """The largest value that its products take."""
    return torch.finfo(torch.float16 if way.products.pv == "fp16" else dtype).max
