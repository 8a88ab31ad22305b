"""Plans of decisions on GPUs for the problems of specs.py, run by Triton's interpreter.

Sizes are small, as it takes about a millisecond for each block of keys that a tile of rows meets:
LENGTH is two blocks of a pattern, the second one ragged; LONGER three.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch
from check import assert_as_accurate
from decided_plans import flags_of, plan_for
from specs import problem_of, random_inputs

from adaattn_compiler.decision import BLOCK, HeadDecision, Pattern, Precision
from adaattn_compiler.kernels.blocks import BlockStructure, block_structure
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.patterns import nearest_first, pattern_blocks
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.selection import selected_blocks
from adaattn_compiler.kernels.triton.decided import attention_as_decided, check
from adaattn_compiler.kernels.triton.decided_plan import base_of
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.runtime.state import new_state
from adaattn_compiler.spec import Load, OperandSpec, b, h
from adaattn_compiler.spec import k as key
from adaattn_compiler.spec import q as row
from adaattn_compiler.target import TARGETS

LENGTH, LONGER = 100, 150
WHOLE, PARTS = Tiles(64, 64), Tiles(32, 32)
WINDOW = HeadDecision(pattern=Pattern(0))
HALF = HeadDecision(scores=Precision.FP16, values=Precision.FP16)


def problem_named(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    rows: int = LENGTH,
    columns: int = LENGTH,
    group: int | None = None,
) -> Problem:
    problem = problem_of(name, dtype, rows=rows, columns=columns)
    spec = dataclasses.replace(problem.spec, group=group or problem.spec.group)
    hints = (batch, rows, columns)
    shape = dataclasses.replace(problem.shape, batch=batch, hints=hints, kv_heads=4 // spec.group)
    sizes = {2: batch, 90: columns, 179: 2 * columns - 1}
    shapes = tuple(tuple(sizes.get(n, n) for n in each) for each in problem.operand_shapes)
    return dataclasses.replace(problem, spec=spec, shape=shape, operand_shapes=shapes)


def last_rows(batch: int = 1) -> Problem:
    """One block of rows at the end of three blocks of keys, of which two are whole."""
    return problem_named("last rows", batch=batch, rows=20, columns=LONGER, group=2)


def gpu_plan(
    problem: Problem, heads: tuple[HeadDecision, ...], tiles: Tiles = WHOLE, **fields: object
) -> DecidedPlan:
    """What no guard stops, but for what `fields` say."""
    dtypes = tuple(operand.dtype for operand in random_inputs(problem)[1])
    on_gpu = dataclasses.replace(problem, device="cuda", operand_dtypes=dtypes)
    base = base_of(on_gpu, tiles, TARGETS["H100"], 4)
    return plan_for(problem, heads, **{"base": base, "rows": 0, **fields})


def through(
    problem: Problem,
    plan: DecidedPlan,
    flags: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> torch.Tensor:
    tensors, operands = random_inputs(problem)
    return attention_as_decided(
        *tensors,
        operands,
        problem.param_hints,
        flags_of(problem) if flags is None else flags,
        new_state(len(plan.heads)) if state is None else state,
        plan.serialize(),
    )


def exactly(problem: Problem, plan: DecidedPlan) -> torch.Tensor:
    return through(problem, plan, flags_of(problem, 0))


def flags_in(plan: DecidedPlan, *tensors: torch.Tensor) -> list[list[int]]:
    return check(*tensors, new_state(4), plan.serialize()).tolist()


# -- what is right ---------------------------------------------------------------------------------


def reference(
    problem: Problem, dtype: torch.dtype, kept: torch.Tensor, turn: torch.Tensor | None = None
) -> torch.Tensor:
    """The oracle where rows meet the kept keys, bool [B,H,M,N], alone; turn: [D,r], a basis."""
    tensors, operands = random_inputs(problem)
    spec = problem.spec
    at = len(spec.operands)
    mask = sympy.And(spec.mask, sympy.Ne(Load(at, b, h, row, key), 0))
    spec = dataclasses.replace(spec, mask=mask, operands=(*spec.operands, OperandSpec("bool", 4)))
    q, k, v = (tensor.to(dtype) for tensor in tensors)
    if turn is not None:
        q, k = (tensor @ turn.to(dtype) for tensor in (q, k))
    extra = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    return reference_attention(q, k, v, [*extra, kept], problem.param_hints, spec)


def by_blocks(blocks: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return blocks.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]


def kept_by(problem: Problem, heads: tuple[HeadDecision, ...]) -> torch.Tensor:
    """bool [B,H,M,N], the mask apart."""
    (q, k, _), _ = random_inputs(problem)
    sizes = (q.shape[2], k.shape[2])
    structure = block_structure(problem.spec.mask, *sizes, BLOCK, BLOCK, problem.param_hints)
    allowed = structure.partial | structure.full
    every = []
    for head, decision in enumerate(heads):
        blocks = torch.ones_like(allowed).expand(q.shape[0], *allowed.shape)
        if decision.pattern is not None:
            blocks = pattern_blocks(decision.pattern, *sizes).expand_as(blocks)
        if decision.selection is not None:
            scale = problem.spec.scale
            whole = None if problem.spec.mask == sympy.true else structure.full
            blocks = selected_blocks(decision.selection, q, k, scale, allowed, whole)[:, head]
        every.append(by_blocks(blocks, *sizes))
    return torch.stack(every, 1)


def assert_right(problem: Problem, heads: tuple[HeadDecision, ...], ours: torch.Tensor) -> None:
    """As accurate as the oracle in the same precision, on the keys that heads keep: of those heads
    that have no means of keys."""
    kept = kept_by(problem, heads)
    bases = [None if decision.basis is None else decision.basis.tensor() for decision in heads]
    for head, (decision, turn) in enumerate(zip(heads, bases, strict=True)):
        if decision.nystrom is not None or decision.pooling is not None:
            continue
        exact = reference(problem, torch.float64, kept, turn)
        rounded = decision.scores == Precision.FP16
        narrow = torch.float16 if rounded else problem.dtype
        eager = reference(problem, narrow, kept, turn).to(problem.dtype)
        assert torch.equal(ours[:, head].isnan(), exact[:, head].isnan())
        assert_as_accurate(ours[:, head], eager[:, head], exact[:, head])


def order_of_lists(
    structure: BlockStructure, sizes: tuple[int, int], tile: tuple[int, int]
) -> torch.Tensor:
    """In which heads that skip meet their blocks: whole ones first, the nearest before the others,
    then those that the mask cuts."""
    rank = nearest_first(*sizes, tile).argsort(-1)
    return torch.where(structure.partial, rank.shape[-1] + rank, rank).argsort(-1)
