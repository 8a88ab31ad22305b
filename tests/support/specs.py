"""A spec for each feature, inputs for it, and what the oracle makes of them."""

from __future__ import annotations

import sympy
import torch

from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Load,
    M,
    N,
    OperandSpec,
    S,
    Where,
    b,
    h,
    k,
    param,
    q,
)

CAUSAL = sympy.Ge(q - k, 0)
WINDOW = sympy.And(CAUSAL, sympy.Ge(k - q + 39, 0))
PADDING = sympy.Ne(Load(0, b, k), 0)
BOOL, FLOAT, INT = OperandSpec("bool", 2), OperandSpec("float", 2), OperandSpec("int", 2)

# name -> (spec, shapes of its operands for B2 H4 M90 N90, params)
SPECS: dict[str, tuple[AttentionSpec, tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "plain": (AttentionSpec(0.3), (), ()),
    "causal": (AttentionSpec(0.3, mask=CAUSAL), (), ()),
    "window": (AttentionSpec(0.3, mask=WINDOW), (), ()),
    "gqa": (AttentionSpec(0.3, mask=CAUSAL, group=2), (), ()),
    "padding": (
        AttentionSpec(0.3, mask=PADDING, empty_row=EmptyRow.ZERO, operands=(BOOL,)),
        ((2, 90),),
        (),
    ),
    "causal padding uniform": (
        AttentionSpec(
            0.3,
            mask=sympy.And(CAUSAL, PADDING),
            empty_row=EmptyRow.UNIFORM,
            operands=(INT,),
            group=2,
        ),
        ((2, 90),),
        (),
    ),
    "causal padding nan": (
        AttentionSpec(
            0.3, mask=sympy.And(CAUSAL, PADDING), empty_row=EmptyRow.NAN, operands=(BOOL,)
        ),
        ((2, 90),),
        (),
    ),
    "alibi": (
        AttentionSpec(0.3, S + (k - q) * Load(0, h), CAUSAL, operands=(OperandSpec("float", 1),)),
        ((4,),),
        (),
    ),
    "distance": (
        AttentionSpec(0.3, S + Load(0, h, k - q + M - 1), operands=(FLOAT,)),
        ((4, 179),),
        (),
    ),
    "causal distance": (
        AttentionSpec(0.3, S + Load(0, h, k - q + M - 1), CAUSAL, operands=(FLOAT,), group=2),
        ((4, 179),),
        (),
    ),
    "dense bias": (
        AttentionSpec(0.3, S + Load(0, 0, h, q, k), operands=(OperandSpec("float", 4),)),
        ((1, 4, 90, 90),),
        (),
    ),
    "softcap": (AttentionSpec(0.1, 5 * sympy.tanh(S), CAUSAL), (), ()),
    "sink": (
        AttentionSpec(
            0.3, mask=WINDOW, sink=Load(0, h), operands=(OperandSpec("float", 1),), group=2
        ),
        ((4,),),
        (),
    ),
    "sink of masked rows": (
        AttentionSpec(
            0.3,
            mask=sympy.Ge(q - k - 10, 0),
            sink=Load(0, h),
            empty_row=EmptyRow.ZERO,
            operands=(OperandSpec("float", 1),),
        ),
        ((4,),),
        (),
    ),
    "finite fill": (AttentionSpec(0.3, Where(CAUSAL, S, sympy.Integer(-20))), (), ()),
    "prefix at run time": (
        AttentionSpec(0.3, mask=sympy.Or(CAUSAL, sympy.Ge(param(0) - k, 0)), params=1),
        (),
        (17,),
    ),
    "last rows": (AttentionSpec(0.3, mask=sympy.Ge(q + N - M - k, 0)), (), ()),
    "per head": (AttentionSpec(0.3, mask=sympy.Or(CAUSAL, sympy.Ge(h - 2, 0))), (), ()),
}


def problem_of(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Problem:
    spec, shapes, params = SPECS[name]
    rows, columns = sizes.get("rows", 90), sizes.get("columns", 90)
    shape = Shape(2, 4, 4 // spec.group, rows, columns, 16, 16, (2, rows, columns))
    return Problem(spec, shape, dtype, "cpu", False, shapes, params)


def random_inputs(problem: Problem, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = problem.shape
    batch, rows, columns = shape.hints

    def random(heads: int, length: int, dim: int) -> torch.Tensor:
        data = torch.randn(batch, length, heads, dim, generator=generator)
        return data.transpose(1, 2).to(problem.dtype)

    tensors = [
        random(shape.heads, rows, shape.head_dim),
        random(shape.kv_heads, columns, shape.head_dim),
        random(shape.kv_heads, columns, shape.value_dim),
    ]
    operands = []
    for kind, size in zip(problem.spec.operands, problem.operand_shapes, strict=True):
        if kind.kind == "float":
            wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
            operands.append(torch.randn(size, generator=generator).to(wide))
        else:
            keep = torch.rand(size, generator=generator) > 0.4
            keep[..., :3] = False  # so that causal rows are empty
            operands.append(keep if kind.kind == "bool" else keep.long())
    return tensors, operands


def oracle(problem: Problem, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    tensors, operands = random_inputs(problem, seed)
    wide = [t.to(dtype) for t in tensors]
    extra = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    return reference_attention(*wide, extra, problem.param_hints, problem.spec)
