"""`adaattn::attention_online`: an attention that gathers in its first calls, then decides.

Plans are text, as in ops.py; `state` (runtime/state.py) is read and written. No gradient: decisions
are for inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaattn_compiler.kernels.online_runner import online_runner

torch.library.define(
    "adaattn::attention_online",
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] params, Tensor(a!) state, str plan)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("adaattn::attention_online", "CPU")
def attention_online(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    state: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    """[B,H,M,E], laid out as [B,M,H,E], of q [B,H,M,D], k [B,G,N,D] and v [B,G,N,E].

    Exact while the state gathers; then each head as decided there, under guards and audits.
    Raises ValueError for text that is no plan, and for a state that is not of it.
    """
    out = online_runner(plan)(q, k, v, operands, params, state)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake_attention_online(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    state: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


torch.library.register_fake("adaattn::attention_online", _fake_attention_online)
