"""torch's own scaled_dot_product_attention, with the flags that a spec allows.

Causal masks become `is_causal`; grouped K and V stay unrepeated; a mask that depends on the key
alone stays [B,1,1,N]. Only a mask over both query and key becomes a tensor of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from adaattn_compiler.kernels.evaluate import (
    dense_bias,
    evaluate_dense,
    positions,
    rank_of,
)
from adaattn_compiler.kernels.problem import Attention, Problem, Sizes
from adaattn_compiler.kernels.through_op import FILLED_ROWS, fills_rows
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, k, q

CAUSAL = sympy.Ge(q - k, 0)

# Where a processor multiplies no bfloat16 in tiles, a few query rows of a 16-bit type take up to
# ten times as long as of float32: an estimate that only decides what is worth measuring.
_FEW_ROWS, _HALVES_OF_FEW_ROWS = 8, 4.0


@dataclass(frozen=True)
class SdpaKernel:
    """See the module's docstring."""

    name: str = "sdpa"
    label: str = "sdpa"
    only_measured: bool = False
    seconds_to_build: float = 0.0

    def refusal(self, problem: Problem) -> str | None:
        spec = problem.spec
        if spec.sink is not None:
            return "SDPA has no sinks"
        if problem.requires_grad and fills_rows(spec):
            return FILLED_ROWS
        if spec.bias is None:
            return "SDPA has no score function but a sum"
        if _rounds_bias(problem):
            return f"its mask on {problem.device} is {problem.dtype}, the bias is not"
        return None

    def cost(self, problem: Problem) -> float:
        """Whole squares unless causal."""
        spec, work = problem.spec, problem.work()
        if spec.dropout_p > 0:
            return work * 4
        few = problem.shape.hints[1] <= _FEW_ROWS
        if problem.device == "cpu" and problem.dtype.itemsize < 4 and few:
            return work * _HALVES_OF_FEW_ROWS
        if spec.mask == CAUSAL and spec.bias == 0:
            return work * 0.6
        return work * (1.0 if spec.mask == sympy.true and spec.bias == 0 else 1.1)

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return None

    def build(self, problem: Problem) -> Attention:
        spec = problem.spec

        def attention(
            q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
        ) -> Any:
            causal = spec.mask == CAUSAL and spec.bias == 0 and _rows_are_safe(spec)
            mask, empty = (None, None)
            if not causal:
                mask, empty = _shared_mask(spec, problem, q_BHMD, operands, sizes)
            out = F.scaled_dot_product_attention(
                q_BHMD,
                k_BGND,
                v_BGNE,
                attn_mask=mask,
                dropout_p=spec.dropout_p,
                is_causal=causal,
                scale=spec.scale,
                enable_gqa=spec.group > 1,
            )
            if empty is None:
                return out
            if problem.requires_grad:  # a product, so that its gradient is NaN as well
                return out * torch.where(empty, float("nan"), 1.0).to(problem.dtype)
            return torch.where(empty, float("nan"), out)

        return attention


def _rows_are_safe(spec: AttentionSpec) -> bool:
    """Whether SDPA's own zero for empty rows is what the spec wants, or cannot occur."""
    return spec.empty_row in (EmptyRow.IMPOSSIBLE, EmptyRow.ZERO)


def _shared_mask(
    spec: AttentionSpec, problem: Problem, like: Any, operands: Sequence[Any], sizes: Sizes
) -> tuple[Any, Any]:
    """The mask, written once for all sites of a graph whose masks are the same."""
    key = (
        spec.mask,
        spec.bias,
        spec.empty_row,
        problem.dtype,
        *(str(part) for part in (*operands, *sizes.scores, *sizes.params)),
    )
    if not isinstance(like, fx.Proxy):
        return _mask(spec, problem, like, operands, sizes)
    if key not in sizes.memo:
        sizes.memo[key] = _mask(spec, problem, like, operands, sizes)
    mask, empty = sizes.memo[key]
    return mask, empty


def _mask(
    spec: AttentionSpec, problem: Problem, like: Any, operands: Sequence[Any], sizes: Sizes
) -> tuple[Any, Any]:
    """(attn_mask, rows that must be NaN): each None where it is not needed."""
    if spec.mask == sympy.true and spec.bias == 0:
        return None, None
    values = positions((spec.mask, spec.bias), like, sizes.scores)
    bias = dense_bias(spec, values, operands, sizes.params)
    if spec.mask == sympy.true:
        mask = _four_axes(bias, spec.bias, problem)
        return mask, _closed_rows(mask, spec)
    keep = evaluate_dense(spec.mask, values, operands, sizes.params)
    keep = keep[(None,) * (4 - rank_of(spec.mask)) + (...,)]
    empty = ~keep.any(-1, keepdim=True) if spec.empty_row is EmptyRow.NAN else None
    if bias is None and spec.empty_row is not EmptyRow.UNIFORM:
        return keep, empty
    if spec.empty_row is EmptyRow.UNIFORM:
        # Finite, so that a row without keys is the mean of V, as the model has it: beside this
        # number its scores vanish.
        shut = (~keep).to(_mask_dtype(problem)) * torch.finfo(_mask_dtype(problem)).min
        return shut if bias is None else _four_axes(bias, spec.bias, problem) + shut, None
    opened = 0.0 if bias is None else _four_axes(bias, spec.bias, problem)
    mask = torch.where(keep, opened, float("-inf"))
    return mask, _closed_rows(mask, spec)


def _closed_rows(mask: Any, spec: AttentionSpec) -> Any:
    """Rows of an additive mask that are -inf throughout, where those must be NaN; else None."""
    if spec.empty_row is not EmptyRow.NAN:
        return None
    return (mask == float("-inf")).all(-1, keepdim=True)


def _four_axes(bias: Any, expression: Any, problem: Problem) -> Any:
    """An additive mask with four axes, of a dtype that SDPA takes."""
    return bias[(None,) * (4 - rank_of(expression)) + (...,)].to(_mask_dtype(problem))


def _mask_dtype(problem: Problem) -> torch.dtype:
    """float32 beside half precision, so that a bias is not rounded more than in the model; not on
    CUDA, whose kernels take masks of the queries' dtype only."""
    if problem.dtype == torch.float64 or problem.device != "cpu":
        return problem.dtype
    return torch.float32


def _rounds_bias(problem: Problem) -> bool:
    """Whether a bias would lose digits as a mask: one that is more than a tensor of that dtype."""
    bias = problem.spec.bias
    if _mask_dtype(problem).itemsize >= 4 or bias == 0:
        return False
    if not isinstance(bias, Load):
        return True
    return problem.dtypes_of_operands()[int(bias.args[0])] != problem.dtype
