"""`adaattn::guarded_attention`, and the two ops that it stands for.

`adaattn::check_envelope` says for each batch item and head whether it may be computed as decided,
`adaattn::attention_as_decided` computes it so, or exactly. Plans are text, as in ops.py. `state`
(runtime/state.py) is read by the first and written by the second. None has a gradient: policies are
for inference.

On the CPU graphs have the one: after milliseconds of computing the interpreter's memory is cold,
and a second op would take half as long as an audit. On CUDA tensors they have the two; both are
launches and torch functions (kernels/triton/decided.py), which Inductor sees in place of the ops,
as of a `triton_op`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from adaattn_compiler.kernels.cpu.decided import decided_runner
from adaattn_compiler.kernels.triton import decided as on_gpu

_CHECK = "(Tensor q, Tensor k, Tensor v, Tensor state, str plan) -> Tensor"
_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] params, Tensor flags,"
    " Tensor(a!) state, str plan) -> Tensor"
)
_GUARDED = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] params, Tensor(a!) state,"
    " str plan) -> Tensor"
)
for _name, _schema in (
    ("check_envelope", _CHECK),
    ("attention_as_decided", _ATTENTION),
    ("guarded_attention", _GUARDED),
):
    torch.library.define(f"adaattn::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("adaattn::check_envelope", "CPU")
def check_envelope(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, plan: str
) -> torch.Tensor:
    """Flags, int32 [B,H], of q [B,H,M,D], k [B,G,N,D] and v [B,G,N,E].

    1: as decided; else exactly, because: 0, statistics left the envelope; -2, the head was demoted.
    Raises ValueError for text that is no plan.
    """
    return decided_runner(plan).check(q, k, v, state)


@torch.library.impl("adaattn::attention_as_decided", "CPU")
def attention_as_decided(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    flags: torch.Tensor,
    state: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    """[B,H,M,E], laid out as [B,M,H,E]; flags as `check_envelope` gives them.

    Some rows are audited: a head that is too far off there is computed exactly after all.
    """
    return _laid_out(decided_runner(plan)(q, k, v, operands, params, flags, state))


@torch.library.impl("adaattn::guarded_attention", "CPU")
def guarded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    state: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    """`attention_as_decided` with the flags of `check_envelope`; [B,H,M,E], laid out likewise."""
    return _laid_out(decided_runner(plan).guarded(q, k, v, operands, params, state))


def _laid_out(out: torch.Tensor) -> torch.Tensor:
    """As the fake ops have it: what was computed row by row is not."""
    _, heads, rows, dim = out.shape
    if out.stride() == (rows * heads * dim, dim, heads * dim, 1):
        return out
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake_check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, plan: str
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], dtype=torch.int32)


def _fake_attention_as_decided(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    flags: torch.Tensor,
    state: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _fake_guarded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    state: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


torch.library.register_fake("adaattn::guarded_attention", _fake_guarded)
torch.library.register_fake("adaattn::check_envelope", _fake_check)
torch.library.register_fake("adaattn::attention_as_decided", _fake_attention_as_decided)


# -- on GPUs ---------------------------------------------------------------------------------------

# What a tensor may be where an op is taken apart.
_TRACED = (torch.Tensor, FunctionalTensor)


def _through(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """The rule by which AOTAutograd's tracing sees a function in place of an op."""

    def rule(
        mode: Any, op: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if args[0].device.type != "cuda":
            return mode.__torch_dispatch__(op, types, args, kwargs)
        if not all(issubclass(each, FakeTensor) or each in _TRACED for each in types):
            return NotImplemented
        with mode:
            return function(*args, **kwargs)

    return rule


for _name, _function in (
    ("check_envelope", on_gpu.check),
    ("attention_as_decided", on_gpu.attention_as_decided),
):
    torch.library.impl(f"adaattn::{_name}", "CUDA", _function)
    torch.library.register_torch_dispatch(
        f"adaattn::{_name}", FunctionalTensorMode, _through(_function)
    )
