"""What kernels share: what cannot be differentiated, and `adaattn::attention` (ops.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from adaattn_compiler.kernels.evaluate import is_printable
from adaattn_compiler.kernels.problem import Attention, Problem, Sizes
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, Where


def op_refusal(problem: Problem) -> str | None:
    """Why the op cannot take a problem, whatever kernel is behind it; None where it can."""
    if problem.device != "cpu":
        return "only on the CPU"
    return code_refusal(problem)


def code_refusal(problem: Problem) -> str | None:
    """Why a problem's expressions are no code, in any language; None where they can be."""
    spec = problem.spec
    if any(isinstance(hint, float) for hint in problem.param_hints):
        return "a run-time number that is no integer, and no operand"
    for expression in (spec.score, spec.mask, spec.sink):
        if expression is not None and not is_printable(expression):
            return f"no code for {expression}"
    return None


FILLED_ROWS = "the gradient of a row without a key, filled with a number, is another"

# Beyond this a row's log-sum-exp, from which SDPA's backward starts, keeps nothing of the sum.
_MOST_FOR_BACKWARD = 2e4


def fills_rows(spec: AttentionSpec) -> bool:
    """Whether a row may be filled with a number so low that its scores and their sum are lost.

    Filled and added numbers are then alike, but only through what is added does a gradient flow:
    a spec does not tell which it was.
    """
    if spec.empty_row is EmptyRow.UNIFORM:
        return True
    if any(abs(number) > _MOST_FOR_BACKWARD for number in spec.score.atoms(sympy.Number)):
        return True
    # A number of the call, under a condition: that it is small is not known.
    chosen = (branch for where in spec.score.atoms(Where) for branch in where.args[1:])
    return any(len(load.args) == 1 for branch in chosen for load in branch.atoms(Load))


def training_refusal(problem: Problem) -> str | None:
    """Why a kernel without a backward cannot take a problem."""
    if problem.requires_grad:
        return "no backward on the CPU"
    return "no dropout" if problem.spec.dropout_p > 0 else None


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite (an overflowing sum says no, too: slow, not wrong)."""
    return all(bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors)


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only where its last stride is not 1."""
    return tensor if tensor.dim() == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


def op_call(plan: str) -> Attention:
    """The function that computes what a plan says, by the op."""

    def attention(
        q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
    ) -> Any:
        return torch.ops.adaattn.attention(
            q_BHMD, k_BGND, v_BGNE, list(operands), list(sizes.params), plan
        )

    return attention
