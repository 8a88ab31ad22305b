"""`adaattn::check_envelope` and `adaattn::attention_as_decided`: a guarded attention, in two ops.

The first says for each batch item and head whether it may be computed as decided, the second
computes it so, or exactly. Plans are text, as in ops.py. `state` (runtime/state.py) is read by the
first and written by the second. Neither has a gradient: policies are for inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaattn_compiler.kernels.cpu.decided import decided_runner

_CHECK = "(Tensor q, Tensor k, Tensor v, Tensor state, str plan) -> Tensor"
_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] params, Tensor flags,"
    " Tensor(a!) state, str plan) -> Tensor"
)
for _name, _schema in (("check_envelope", _CHECK), ("attention_as_decided", _ATTENTION)):
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
    out = decided_runner(plan)(q, k, v, operands, params, flags, state)
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


torch.library.register_fake("adaattn::check_envelope", _fake_check)
torch.library.register_fake("adaattn::attention_as_decided", _fake_attention_as_decided)
