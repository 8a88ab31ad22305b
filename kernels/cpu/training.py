"""Attention with a gradient: `adaattn::attention_training` and `adaattn::attention_backward`.

Both are pure: what dropout leaves out is a function of a seed, which is an input, drawn in the
graph by torch's own generator, so that autograd, checkpointing and Inductor treat randomness as
they do elsewhere. The forward op also returns what the backward one starts from: each row's
statistics, rather than their log-sum-exp, which keeps less of the sum the larger the scores are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from adaattn_compiler.kernels.cpu.call import Arguments, Plan
from adaattn_compiler.kernels.cpu.runner import CppRunner, cpp_runner
from adaattn_compiler.kernels.problem import Attention, Sizes
from adaattn_compiler.kernels.reference import attention_by_rows, gradients_by_rows

# Seeds are below this.
_SEEDS = (1 << 62) - 1


def training_call(plan: str, dropout_p: float) -> Attention:
    """The function that computes what a plan says, with a gradient and with dropout."""

    def attention(
        q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
    ) -> Any:
        seed = _seed(q_BHMD) if dropout_p > 0 else None
        out, _ = torch.ops.adaattn.attention_training(
            q_BHMD, k_BGND, v_BGNE, list(operands), list(sizes.params), seed, plan
        )
        return out

    return attention


def _seed(like: Any) -> Any:
    """A number drawn by torch's generator; a node of the graph where `like` is a proxy."""
    if isinstance(like, fx.Proxy):
        return like.tracer.create_proxy("call_function", torch.randint, (_SEEDS, (1,)), {})
    return torch.randint(_SEEDS, (1,))


@torch.library.custom_op("adaattn::attention_training", mutates_args=(), device_types="cpu")
def attention_training(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    seed: torch.Tensor | None,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [B,H,M,D], k [B,G,N,D] and v [B,G,N,E] as a plan says, to be differentiated.

    Returns the result [B,H,M,E], laid out as [B,M,H,E], and statistics [B,H,M,2], float32. seed:
    int64 [1], of dropout. Raises ValueError for tensors that the plan is not for.
    """
    runner = cpp_runner(plan)
    statistics = q.new_zeros((*q.shape[:3], 2), dtype=torch.float32)
    if 0 in (*q.shape, *k.shape, *v.shape):
        return attention_by_rows(q, k, v, operands, params, runner.spec), statistics
    number = 0 if seed is None else int(seed)
    return runner(q, k, v, operands, params, seed=number, statistics=statistics), statistics


@attention_training.register_fake
def _fake_attention_training(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    seed: torch.Tensor | None,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty((*q.shape[:3], 2), dtype=torch.float32)


@torch.library.custom_op("adaattn::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    seed: torch.Tensor | None,
    wanted: Sequence[bool],
    plan: str,
) -> list[torch.Tensor]:
    """The gradients of q, k and v, and of the operands that are wanted, in this order.

    Those of q, k, v are laid out as [B,length,heads,dim]. Raises ValueError as the forward does.
    """
    runner: CppRunner = cpp_runner(plan)
    number = 0 if seed is None else int(seed)
    if 0 in (*q.shape, *k.shape, *v.shape):
        found = gradients_by_rows(grad_out, (q, k, v), operands, params, runner.spec, wanted)
        return _laid_out(found)
    nothing = torch.empty(0, dtype=torch.int32)
    arguments = Arguments(
        q,
        k,
        v,
        out,
        operands,
        params,
        Plan(nothing, nothing),
        number,
        statistics=statistics.contiguous(),
    )
    return _laid_out(runner.backward(grad_out, arguments, wanted))


def _laid_out(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As the fake has them: written out by autograd, gradients lie as the inputs do."""
    of_qkv = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads[:3]]
    return of_qkv + [grad.contiguous() for grad in grads[3:]]


@attention_backward.register_fake
def _fake_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    seed: torch.Tensor | None,
    wanted: Sequence[bool],
    plan: str,
) -> list[torch.Tensor]:
    grads = [
        t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)
        for t in (q, k, v)
    ]
    found = zip(operands, wanted, strict=True)
    return grads + [operand.new_empty(operand.shape) for operand, want in found if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, operands, params, seed, plan = inputs
    ctx.save_for_backward(q, k, v, *output, *([] if seed is None else [seed]), *operands)
    ctx.mark_non_differentiable(output[1])
    ctx.has_seed, ctx.params, ctx.plan = seed is not None, params, plan


def _gradients(ctx: Any, grad_out: torch.Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, statistics, *rest = ctx.saved_tensors
    seed = rest.pop(0) if ctx.has_seed else None
    can = cpp_runner(ctx.plan).differentiable
    needed = ctx.needs_input_grad[3]
    wanted = [i in can and bool(needed[i]) for i in range(len(rest))]
    given = (grad_out, q, k, v, out, statistics, rest, ctx.params, seed)
    found = attention_backward(*given, wanted, ctx.plan)
    grads, of_operands = found[:3], list(found[3:])
    spread = [of_operands.pop(0) if want else None for want in wanted]
    # An empty list counts as one of tensors, one of numbers does not.
    return (*grads, spread, None if ctx.params else [], None, None)


attention_training.register_autograd(_gradients, setup_context=_setup)
