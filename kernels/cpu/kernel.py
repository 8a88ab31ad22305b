"""The generated C++ kernel, as one that can be chosen (kernels/problem.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaattn_compiler.kernels.blocks import block_structure, density
from adaattn_compiler.kernels.cpu.expressions import NoCpp
from adaattn_compiler.kernels.cpu.library import CannotBuild, compiler
from adaattn_compiler.kernels.cpu.runner import BLOCK, configuration_of, cpp_runner, plan_of
from adaattn_compiler.kernels.cpu.source import source_of
from adaattn_compiler.kernels.problem import Attention, Problem
from adaattn_compiler.kernels.through_op import op_call, op_refusal

# Time per unit of work beside SDPA's own, where nothing was measured.
_TIME = {torch.float32: 0.8, torch.bfloat16: 0.5, torch.float16: 0.8}
_WIDEST_HEAD = 256
# Positions are 32-bit in the generated code.
_LONGEST = 1 << 30


@dataclass(frozen=True)
class CppKernel:
    """See docs/kernels.md."""

    name: str = "cpp"
    seconds_to_build: float = 2.0

    def refusal(self, problem: Problem) -> str | None:
        shape = problem.shape
        if problem.dtype not in _TIME:
            return f"not for {problem.dtype}"
        if max(shape.head_dim, shape.value_dim) > _WIDEST_HEAD:
            return f"not for head dimensions above {_WIDEST_HEAD}"
        if max(shape.hints) > _LONGEST:
            return f"not for lengths above {_LONGEST}"
        refused = op_refusal(problem)
        if refused is not None:
            return refused
        try:
            compiler()
            source_of(configuration_of(problem))
        except (NoCpp, CannotBuild) as error:
            return str(error)
        return None

    def cost(self, problem: Problem) -> float:
        """The blocks that are attended to."""
        shape = problem.shape
        batch, rows, columns = shape.hints
        work = 2.0 * batch * shape.heads * rows * columns * (shape.head_dim + shape.value_dim)
        blocks = block_structure(problem.spec.mask, rows, columns, *BLOCK, problem.param_hints)
        return work * density(blocks) * _TIME[problem.dtype]

    def build(self, problem: Problem) -> Attention:
        plan = plan_of(problem)
        cpp_runner(plan)  # built now: a failure must be known before the graph is written
        return op_call(plan)
