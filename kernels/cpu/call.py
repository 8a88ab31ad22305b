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


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        *((name, _POINTER) for name in ("lse", "statistics")),
        *((name, _INT) for name in ("batch", "heads", "rows", "columns")),
        *((name, _POINTER) for name in ("operands", "params", "offsets", "blocks")),
        *((name, _INT) for name in ("list_batch_stride", "list_head_stride")),
        ("key_bias", _POINTER),
        *((name, _INT) for name in ("key_bias_batch_stride", "key_bias_head_stride")),
        *((name, _INT) for name in ("scores_in_bfloat16", "values_in_bfloat16", "threads")),
        ("seed", ctypes.c_uint64),
    )


class _OperandGradient(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("copy_stride", _INT), ("stride", _INT * 4))

    @staticmethod
    def of(copies: torch.Tensor | None) -> _OperandGradient:
        if copies is None:
            return _OperandGradient()
        strides = (*copies.stride()[1:], 0, 0, 0, 0)
        copy_stride = copies.stride(0) if copies.dtype == torch.float64 else 0
        return _OperandGradient(copies.data_ptr(), copy_stride, (_INT * 4)(*strides[:4]))


class _BackwardCall(ctypes.Structure):
    _fields_ = (
        ("call", _Call),
        *((name, _Tensor) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("gradients", _POINTER),
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


@dataclass(frozen=True)
class Arguments:
    """What both passes read, and what the forward pass writes.

    q, k, v, out: [B,heads,length,dim], each with 1 as its last stride. params: the spec's numbers.
    seed: of dropout. Of each row, contiguous or None: lse [B,H,M], statistics [B,H,M,2] (the
    largest score, the sum of exp(score - largest)), both float32.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    operands: Sequence[torch.Tensor]
    params: Sequence[int]
    plan: Plan
    seed: int = 0
    lse: torch.Tensor | None = None
    statistics: torch.Tensor | None = None


def forward(compiled: ctypes.CDLL, arguments: Arguments) -> int:
    """The status of the forward pass; out, and of the rest what is there, are written."""
    held = _Held.of(arguments)
    return int(compiled.attention_forward(ctypes.byref(held.call)))


def backward(
    compiled: ctypes.CDLL,
    arguments: Arguments,
    grad_out: torch.Tensor,
    grads: Sequence[torch.Tensor],
    operand_grads: Sequence[torch.Tensor | None],
) -> int:
    """The status of the backward pass, which writes grads, those of (q, k, v).

    operand_grads: for each operand zeros to be added to, float64 [threads, *its shape] or float32
    [1, *its shape], or None.
    """
    held = _Held.of(arguments)
    gradients = (_OperandGradient * max(len(operand_grads), 1))(
        *map(_OperandGradient.of, operand_grads)
    )
    wanted = any(grad is not None for grad in operand_grads)
    call = _BackwardCall(
        held.call,
        _Tensor.of(grad_out),
        *map(_Tensor.of, grads),
        ctypes.cast(gradients, _POINTER) if wanted else None,
    )
    return int(compiled.attention_backward(ctypes.byref(call)))


@dataclass(frozen=True)
class _Held:
    """A call, and the arrays that it points to."""

    call: _Call
    arrays: tuple[Any, ...]

    @staticmethod
    def of(given: Arguments) -> _Held:
        operands = (_Operand * max(len(given.operands), 1))(*map(_Operand.of, given.operands))
        params = (_INT * max(len(given.params), 1))(*given.params)
        plan, lists, bias = given.plan, given.plan.offsets, given.plan.key_bias
        call = _Call(
            *map(_Tensor.of, (given.q, given.k, given.v, given.out)),
            *map(_address, (given.lse, given.statistics)),
            *given.q.shape[:3],
            given.k.shape[2],
            ctypes.cast(operands, _POINTER),
            ctypes.cast(params, _POINTER),
            lists.data_ptr(),
            plan.blocks.data_ptr(),
            *_shared_strides(lists),
            _address(bias),
            *((0, 0) if bias is None else _shared_strides(bias)),
            plan.scores_in_bfloat16,
            plan.values_in_bfloat16,
            torch.get_num_threads(),
            given.seed,
        )
        return _Held(call, (operands, params))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _shared_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of batch items and heads, 0 where there is one for all."""
    batch, head = tensor.shape[:2]
    return tensor.stride(0) if batch > 1 else 0, tensor.stride(1) if head > 1 else 0
