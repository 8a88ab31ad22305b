"""A Triton kernel that a user might have: as many arguments as ours, and next to nothing to do."""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def copy_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    statistics_ptr,
    entropy_ptr,
    maximum_ptr,
    table_ptr,
    blocks_ptr,
    flags_ptr,
    alternative_table_ptr,
    alternative_blocks_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kg,
    stride_kn,
    stride_vb,
    stride_vg,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_tb,
    stride_th,
    stride_fb,
    stride_fh,
    stride_ab,
    stride_ah,
    H,
    M,
    N,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = q, one head to a program."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, DIM)
    inside = (rows < M)[:, None]
    places = b * stride_qb + h * stride_qh + rows[:, None] * stride_qm + dims[None, :]
    there = b * stride_ob + h * stride_oh + rows[:, None] * stride_om + dims[None, :]
    tl.store(out_ptr + there, tl.load(q_ptr + places, mask=inside), mask=inside)


def bystander(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """Its launch, as torch.compile finds it in a model."""
    batch, heads, rows, dim = q.shape
    out = torch.empty_like(q)
    missing = (None, None, None)
    given: tuple[Any, ...] = (q, k, v, out, *missing, None, table, blocks, *missing)
    strides = [stride for tensor in (q, k, v, out) for stride in tensor.stride()[:3]]
    sizes = (*table.stride()[:2], 0, 0, 0, 0, heads, rows, k.shape[2])
    copy_rows[(batch * heads,)](*given, *strides, *sizes, DIM=dim, BLOCK=64)
    return out
