"""One call of a library: the structures of call.h, filled from tensors.

All their members are 64 bits wide: a structure is packed as a row of numbers, in the order of its
members. A call takes microseconds; with ctypes.Structure it would take twice as many.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaattn_compiler.runtime.state import Column

DONE, NOT_FINITE, NO_MEMORY = 0, 1, 2
# Bits of a plan's modes: which product's operands are rounded.
SCORES_IN_BFLOAT16, VALUES_IN_BFLOAT16 = 1, 2
# Blocks of a step of the softmax (kStepBlocks).
STEP_BLOCKS = 4


@dataclass(frozen=True)
class Plan:
    """What may change from call to call: which key blocks meet which query rows, and how exactly.

    offsets: int32 [B|1, H|1, blocks of query rows + 1], places in `blocks`; the lists of a head
    follow each other there. blocks: int32, each 2 * index + (1 where masked inside).
    key_bias: float32 [B|1, H|1, N], added to each key's score. modes: int32 [B|1, H|1], sums of
    SCORES_IN_BFLOAT16 and VALUES_IN_BFLOAT16. skip: float32 [B|1, H|1], above 0, inf for never:
    a block of keys is left out for a row if its scores all lie by more than this below the largest
    that the row has met up to the end of the step of STEP_BLOCKS blocks. Blocks are taken in the
    order of their list: those that are likely to matter first let more of the others be skipped. Up
    to eight rows are computed without either.
    """

    offsets: torch.Tensor
    blocks: torch.Tensor
    key_bias: torch.Tensor | None = None
    modes: torch.Tensor | None = None
    skip: torch.Tensor | None = None

    @functools.cached_property
    def numbers(self) -> tuple[int, ...]:
        """Its members of Call."""
        return (
            self.offsets.data_ptr(),
            self.blocks.data_ptr(),
            *_shared_strides(self.offsets),
            *_of_heads(self.key_bias),
            *_of_heads(self.modes),
            *_of_heads(self.skip),
        )


@dataclass(frozen=True)
class Arguments:
    """What both passes read, and what the forward pass writes.

    q, k, v, out: [B,heads,length,dim], each with 1 as its last stride. params: the spec's numbers.
    seed: of dropout. Of each row, contiguous or None: lse [B,H,M], statistics [B,H,M,2] (the
    largest score, the sum of exp(score - largest)), both float32; skipped [B,H], int64, is added
    to: how often a row has left out a block of keys. places, compared: of an audit (`audit`).
    joins: whether out and lse hold what other keys gave, to which these are joined, log_count added
    to their scores.
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
    skipped: torch.Tensor | None = None
    places: Sequence[int] = ()
    compared: torch.Tensor | None = None
    joins: bool = False
    log_count: float = 0.0


def forward(compiled: ctypes.CDLL, arguments: Arguments) -> int:
    """The status of the forward pass; out, and of the rest what is there, are written."""
    # Arrays that others point to stay until the call returns.
    operands, params = _operands_of(arguments.operands), _row_of(arguments.params)
    places = _row_of(arguments.places)
    call = _call_of(arguments, operands, params, places)
    return int(compiled.attention_forward(_CALL.pack(*call)))


def guard(
    compiled: ctypes.CDLL,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bounds: Sequence[torch.Tensor],
    state: torch.Tensor,
    flags: torch.Tensor,
) -> None:
    """Write flags, int32 [B,H] (guards.h). bounds: low and high, float32 [9,H]; state: float64
    [H, columns] (runtime/state.py). All but q, k and v contiguous."""
    q, k, v = qkv
    low, high = bounds
    call = _GUARD.pack(
        *_tensor_of(q),
        *_tensor_of(k),
        *_tensor_of(v),
        *(*q.shape[:3], k.shape[2], torch.get_num_threads()),
        *(low.data_ptr(), high.data_ptr(), state.data_ptr(), state.shape[1], Column.DEMOTED),
        flags.data_ptr(),
    )
    compiled.attention_guard(call)


@dataclass(frozen=True)
class Judgement:
    """By what an attention is judged that is computed as decided (decided.h).

    exact: int32 [row blocks + 1], the offsets of an exact head. limits, budgets: float64 [H],
    relative errors of one call and of the moving average. rows: how many are audited; masked:
    whether the mask leaves anything out; may_be_empty: whether a row may be without a key as
    decided that has one.
    """

    exact: torch.Tensor
    limits: torch.Tensor
    budgets: torch.Tensor
    rows: int
    masked: bool
    may_be_empty: bool


def decided(
    compiled: ctypes.CDLL,
    arguments: Arguments,
    flags: torch.Tensor,
    judgement: Judgement,
    state: torch.Tensor,
) -> int:
    """The status; out and state, float64 [H, columns], are written. flags: int32 [B,H]."""
    operands, params = _operands_of(arguments.operands), _row_of(arguments.params)
    call = _CALL.pack(*_call_of(arguments, operands, params, _row_of(())))
    tensors = (flags, judgement.exact, judgement.limits, judgement.budgets, state)
    further = _DECIDED.pack(
        *(tensor.data_ptr() for tensor in tensors),
        judgement.rows,
        judgement.masked,
        judgement.may_be_empty,
    )
    return int(compiled.attention_decided(call + further))


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
    operands, params = _operands_of(arguments.operands), _row_of(arguments.params)
    gradients = _row_of([number for grad in operand_grads for number in _gradient_of(grad)])
    wanted = any(grad is not None for grad in operand_grads)
    further = [number for tensor in (grad_out, *grads) for number in _tensor_of(tensor)]
    further.append(ctypes.addressof(gradients) if wanted else 0)
    call = _CALL.pack(*_call_of(arguments, operands, params, _row_of(())))
    return int(compiled.attention_backward(call + struct.pack(f"{len(further)}q", *further)))


_CALL = struct.Struct("39qQ4qd")  # the seed has no sign
_DECIDED = struct.Struct("8q")
_GUARD = struct.Struct("23q")
_Row = ctypes.Array[ctypes.c_int64]


def _row_of(numbers: Sequence[int]) -> _Row:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _call_of(given: Arguments, operands: _Row, params: _Row, places: _Row) -> tuple[float, ...]:
    """Call."""
    return (
        *_tensor_of(given.q),
        *_tensor_of(given.k),
        *_tensor_of(given.v),
        *_tensor_of(given.out),
        _address(given.lse),
        _address(given.statistics),
        *given.q.shape[:3],
        given.k.shape[2],
        ctypes.addressof(operands),
        ctypes.addressof(params),
        *given.plan.numbers,
        _address(given.skipped),
        torch.get_num_threads(),
        given.seed,
        ctypes.addressof(places) if given.places else 0,
        len(given.places),
        _address(given.compared),
        given.joins,
        given.log_count,
    )


def _tensor_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Tensor."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


def _operands_of(operands: Sequence[torch.Tensor]) -> _Row:
    """Operand[]."""
    return _row_of([n for o in operands for n in (o.data_ptr(), *_four(o.stride()))])


def _gradient_of(copies: torch.Tensor | None) -> tuple[int, ...]:
    """OperandGradient."""
    if copies is None:
        return (0,) * 6
    copy_stride = copies.stride(0) if copies.dtype == torch.float64 else 0
    return (copies.data_ptr(), copy_stride, *_four(copies.stride()[1:]))


def _four(strides: Sequence[int]) -> tuple[int, ...]:
    return (*strides, 0, 0, 0, 0)[:4]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _of_heads(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Address and strides of what each head has of its own, or all share."""
    return (0, 0, 0) if tensor is None else (_address(tensor), *_shared_strides(tensor))


def _shared_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of batch items and heads, 0 where there is one for all."""
    batch, head = tensor.shape[:2]
    return tensor.stride(0) if batch > 1 else 0, tensor.stride(1) if head > 1 else 0
