"""One call of a library: the structures of call.h, filled from tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_INT = ctypes.c_int64
_POINTER = ctypes.c_void_p

DONE, NOT_FINITE, NO_MEMORY = 0, 1, 2


class _Tensor(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("batch", _INT), ("head", _INT), ("row", _INT))

    @staticmethod
    def of(tensor: torch.Tensor) -> _Tensor:
        batch, head, row, _ = tensor.stride()
        return _Tensor(tensor.data_ptr(), batch, head, row)


class _Operand(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("stride", _INT * 4))

    @staticmethod
    def of(tensor: torch.Tensor) -> _Operand:
        strides = (*tensor.stride(), 0, 0, 0, 0)
        return _Operand(tensor.data_ptr(), (_INT * 4)(*strides[:4]))


class Call(ctypes.Structure):
    """See call.h."""

    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("lse", _POINTER),
        *((name, _INT) for name in ("batch", "heads", "rows", "columns")),
        *((name, _POINTER) for name in ("operands", "params", "offsets", "blocks")),
        *((name, _INT) for name in ("list_batch_stride", "list_head_stride")),
        ("key_bias", _POINTER),
        *((name, _INT) for name in ("key_bias_batch_stride", "key_bias_head_stride")),
        *((name, _INT) for name in ("scores_in_bfloat16", "values_in_bfloat16", "threads")),
    )


@dataclass(frozen=True)
class Plan:
    """What may change from call to call: which key blocks meet which query rows, and how exactly.

    offsets: int32 [B|1, H|1, blocks of query rows + 1], places in `blocks`; the lists of a head
    follow each other there. blocks: int32, each 2 * index + (1 where masked inside).
    key_bias: float32 [B|1, H|1, N], added to each key's score. The flags let the products of a
    stage take bfloat16 for float32 tensors.
    """

    offsets: torch.Tensor
    blocks: torch.Tensor
    key_bias: torch.Tensor | None = None
    scores_in_bfloat16: bool = False
    values_in_bfloat16: bool = False


def forward(
    compiled: ctypes.CDLL,
    tensors: Sequence[torch.Tensor],
    lse: torch.Tensor | None,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    plan: Plan,
) -> int:
    """The status of the forward pass on (q, k, v, out), each with 1 as its last stride."""
    q, k, _, _ = tensors
    batch, heads, rows, _ = q.shape
    given: dict[str, Any] = dict(zip(("q", "k", "v", "out"), map(_Tensor.of, tensors), strict=True))
    held = (_Operand * max(len(operands), 1))(*map(_Operand.of, operands))
    numbers = (_INT * max(len(params), 1))(*params)
    if plan.key_bias is not None:
        bias = plan.key_bias
        given["key_bias"] = bias.data_ptr()
        given["key_bias_batch_stride"] = bias.stride(0) if bias.shape[0] > 1 else 0
        given["key_bias_head_stride"] = bias.stride(1) if bias.shape[1] > 1 else 0
    lists = plan.offsets
    call = Call(
        lse=None if lse is None else lse.data_ptr(),
        batch=batch,
        heads=heads,
        rows=rows,
        columns=k.shape[2],
        operands=ctypes.cast(held, _POINTER),
        params=ctypes.cast(numbers, _POINTER),
        offsets=lists.data_ptr(),
        blocks=plan.blocks.data_ptr(),
        list_batch_stride=lists.stride(0) if lists.shape[0] > 1 else 0,
        list_head_stride=lists.stride(1) if lists.shape[1] > 1 else 0,
        scores_in_bfloat16=plan.scores_in_bfloat16,
        values_in_bfloat16=plan.values_in_bfloat16,
        threads=torch.get_num_threads(),
        **given,
    )
    return int(compiled.attention_forward(ctypes.byref(call)))
