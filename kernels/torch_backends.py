"""torch's own CUDA attentions, each by its own op: what SDPA would pick among, picked here.

`F.scaled_dot_product_attention` chooses by an order of its own, which is not that of their speed;
and FlashAttention-2 knows windows, which SDPA has no argument for. They take part where they can
be measured: what a version of torch or of cuDNN refuses shows when it is first run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import And

from adaattn_compiler.kernels.blocks import block_structure, density
from adaattn_compiler.kernels.problem import Attention, Problem, Shape, Sizes
from adaattn_compiler.kernels.sdpa import CAUSAL
from adaattn_compiler.kernels.through_op import FILLED_ROWS, fills_rows
from adaattn_compiler.predicates import normalized
from adaattn_compiler.spec import EmptyRow, M, N, S, k, q

aten = torch.ops.aten

_HALVES = (torch.bfloat16, torch.float16)
_WIDEST_HEAD = 256
# Rows and keys of a block, and the time of a window beside that of all pairs in it: so little that
# it takes part beside the generated kernel, so much that this does beside it.
_BLOCK, _TIME_OF_WINDOW = (128, 128), 1.6


@dataclass(frozen=True)
class Window:
    """Keys i + N - M - left to i + N - M + right of row i; None: as far as there are keys."""

    left: int | None
    right: int | None


def window_of(mask: Any, shape: Shape) -> Window | None:
    """A mask as a window along the diagonal that ends at the last row and key; None for others."""
    same = shape.rows is not None and shape.rows == shape.columns
    place = normalized(mask)
    if place == sympy.true:
        return Window(None, None)
    left: int | None = None
    right: int | None = None
    for part in place.args if isinstance(place, And) else (place,):
        if not isinstance(part, sympy.Ge) or part.rhs != 0:
            return None
        # Of the last row and the last key: how far the one may be from the other.
        distance = k - q - (0 if same else N - M)
        ahead, behind = sympy.expand(part.lhs + distance), sympy.expand(part.lhs - distance)
        if ahead.is_Integer and ahead >= 0 and right is None:
            right = int(ahead)
        elif behind.is_Integer and behind >= 0 and left is None:
            left = int(behind)
        else:
            return None
    return Window(left, right)


@dataclass(frozen=True)
class BackendKernel:
    """One of torch's ops; takes: why it cannot take a problem whose score and mask are plain."""

    name: str
    call: Callable[[Problem, Any, Any, Any], Any]
    takes: Callable[[Problem], str | None]
    seconds_to_build: float = 0.0
    only_measured: bool = True

    @property
    def label(self) -> str:
        return self.name

    def refusal(self, problem: Problem) -> str | None:
        spec, shape = problem.spec, problem.shape
        if problem.device != "cuda":
            return "only on CUDA"
        if spec.score != S or spec.sink is not None:
            return "only for plain scores"
        if spec.dropout_p > 0:
            return "no dropout here"
        if problem.requires_grad and fills_rows(spec):
            return FILLED_ROWS
        if spec.empty_row not in (EmptyRow.IMPOSSIBLE, EmptyRow.ZERO):
            return "a row without a key is 0"
        if shape.head_dim % 8 or shape.head_dim > _WIDEST_HEAD:
            return f"not for a head dimension of {shape.head_dim}"
        if shape.value_dim != shape.head_dim:
            return "only for V as wide as K"
        return self.takes(problem)

    def cost(self, problem: Problem) -> float:
        """Beside SDPA's own."""
        mask = problem.spec.mask
        if mask in (sympy.true, CAUSAL):
            return problem.work(0.6 if mask == CAUSAL else 1.0)
        _, rows, columns = problem.shape.hints
        attended = density(block_structure(mask, rows, columns, *_BLOCK, problem.param_hints))
        return problem.work(min(attended * _TIME_OF_WINDOW, 1.0))

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return None

    def build(self, problem: Problem) -> Attention:
        call = self.call

        def attention(
            q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
        ) -> Any:
            return call(problem, q_BHMD, k_BGND, v_BGNE)

        return attention


def _plain_or_causal(problem: Problem) -> str | None:
    """Their causal masks begin at the first row and key."""
    if problem.dtype not in _HALVES:
        return f"not for {problem.dtype}"
    shape = problem.shape
    same = shape.rows is not None and shape.rows == shape.columns
    if problem.spec.mask == sympy.true or (problem.spec.mask == CAUSAL and same):
        return None
    return "only for causal masks of a square, or none"


def _cudnn(problem: Problem, q_BHMD: Any, k_BGND: Any, v_BGNE: Any) -> Any:
    causal = problem.spec.mask == CAUSAL
    return aten._scaled_dot_product_cudnn_attention(
        q_BHMD,
        k_BGND,
        v_BGNE,
        None,
        problem.requires_grad,
        0.0,
        causal,
        False,
        scale=problem.spec.scale,
    )[0]


def _efficient(problem: Problem, q_BHMD: Any, k_BGND: Any, v_BGNE: Any) -> Any:
    causal = problem.spec.mask == CAUSAL
    return aten._scaled_dot_product_efficient_attention(
        q_BHMD,
        k_BGND,
        v_BGNE,
        None,
        problem.requires_grad,
        0.0,
        causal,
        scale=problem.spec.scale,
    )[0]


def _for_efficient(problem: Problem) -> str | None:
    return "no groups" if problem.spec.group > 1 else _plain_or_causal(problem)


def _for_flash(problem: Problem) -> str | None:
    if problem.dtype not in _HALVES:
        return f"not for {problem.dtype}"
    if window_of(problem.spec.mask, problem.shape) is None:
        return "only for windows along the diagonal"
    return None


def _flash(problem: Problem, q_BHMD: Any, k_BGND: Any, v_BGNE: Any) -> Any:
    """FlashAttention-2, with its tensors as [B,length,heads,dim]."""
    window = window_of(problem.spec.mask, problem.shape)
    assert window is not None
    causal = window == Window(None, 0)
    out = aten._flash_attention_forward(
        q_BHMD.transpose(1, 2),
        k_BGND.transpose(1, 2),
        v_BGNE.transpose(1, 2),
        None,
        None,
        q_BHMD.size(2),
        k_BGND.size(2),
        0.0,
        causal,
        False,
        scale=problem.spec.scale,
        window_size_left=None if causal else window.left,
        window_size_right=None if causal else window.right,
    )[0]
    return out.transpose(1, 2)


TORCH_BACKENDS = (
    BackendKernel("cudnn", _cudnn, _plain_or_causal),
    BackendKernel("flash", _flash, _for_flash),
    BackendKernel("efficient", _efficient, _for_efficient),
)
