"""`adaattn::attention`: one op for every kernel of ours, its plan a string.

The plan says which kernel and for what, in full, so that a graph that holds the op runs in any
process (and from any of torch's caches): what is not there yet is built when first called.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adaattn_compiler.kernels.cpu.runner import cpp_runner
from adaattn_compiler.kernels.flex import flex_runner
from adaattn_compiler.kernels.reference import attention_by_rows
from adaattn_compiler.kernels.strips import strips_runner
from adaattn_compiler.kernels.through_op import all_finite

# Defined by hand: torch.library.custom_op wraps what is called in 20 microseconds of its own.
torch.library.define(
    "adaattn::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] params, str plan) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("adaattn::attention", "CPU")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    plan: str,
) -> torch.Tensor:
    """Attention of q [B,H,M,D], k [B,G,N,D] and v [B,G,N,E] as a plan says: [B,H,M,E].

    operands and params are those of the plan's spec. Returns memory laid out as [B,M,H,E].
    Raises ValueError for text that is no plan. Has no gradient: see _without_gradient.
    """
    runner = _RUNNERS[_kernel_of(plan)](plan)
    finite = runner.carries_nan or all_finite(q, k, v)
    if not (finite and q.numel() and k.numel() and v.numel()):
        # Kernels do not carry NaN to every row that it belongs in; written out, it gets there.
        return _as_fake(attention_by_rows(q, k, v, operands, params, runner.spec))
    return _as_fake(runner(q, k, v, operands, params))


def attention_on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    plan: str,
) -> torch.Tensor:
    """The same by the one kernel that runs there.

    Whether all is finite is not asked: the answer would have to be waited for.
    """
    if _kernel_of(plan) != "flex":
        raise ValueError(f"not a plan for a GPU: {plan[:80]!r}")
    runner = flex_runner(plan)
    if not (q.numel() and k.numel() and v.numel()):
        return _as_fake(attention_by_rows(q, k, v, operands, params, runner.spec))
    return _as_fake(runner(q, k, v, operands, params))


torch.library.impl("adaattn::attention", "CUDA", attention_on_gpu)


def _as_fake(out: torch.Tensor) -> torch.Tensor:
    """As the fake says it lies, and no alias of an input."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


_RUNNERS: dict[str, Callable[[str], Any]] = {
    "cpp": cpp_runner,
    "strips": strips_runner,
    "flex": flex_runner,
}


@functools.cache
def _kernel_of(plan: str) -> str:
    """The name of the kernel that a plan is for."""
    try:
        return str(ast.literal_eval(plan)["kernel"])
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise ValueError(f"not a plan: {plan[:80]!r}") from error


def _fake_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    plan: str,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _without_gradient(
    keys: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    plan: str,
) -> torch.Tensor:
    """RuntimeError where a gradient is asked for: without this it would be none, with a warning."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *operands)):
        raise RuntimeError("adaattn::attention has no gradient; call it under torch.no_grad()")
    with torch._C._AutoDispatchBelowAutograd():
        result: torch.Tensor = _OP.redispatch(
            keys & torch._C._after_autograd_keyset, q, k, v, operands, params, plan
        )
    return result


# Private torch, checked with 2.11 and 2.13: redispatch below autograd.
_OP = torch.ops.adaattn.attention.default
torch.library.register_fake("adaattn::attention", _fake_attention)
_LIBRARY = torch.library.Library("adaattn", "FRAGMENT")
_LIBRARY.impl("attention", _without_gradient, "Autograd", with_keyset=True)
