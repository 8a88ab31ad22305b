"""The generated C++ kernel, as one that can be chosen (kernels/problem.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaattn_compiler.kernels.blocks import block_structure, density
from adaattn_compiler.kernels.cpu.library import CannotBuild, compiler, start_building
from adaattn_compiler.kernels.cpu.plans import BLOCK
from adaattn_compiler.kernels.cpu.runner import configuration_of, cpp_runner, plan_of
from adaattn_compiler.kernels.cpu.source import gradient_source_of, source_of
from adaattn_compiler.kernels.cpu.training import training_call
from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.problem import Attention, Problem
from adaattn_compiler.kernels.through_op import FILLED_ROWS, fills_rows, op_call, op_refusal

# Time per unit of work beside SDPA's own, where nothing was measured.
_TIME = {torch.float32: 0.8, torch.bfloat16: 0.5, torch.float16: 0.8}
_WIDEST_HEAD = 256
# Positions are 32-bit in the generated code.
_LONGEST = 1 << 30


@dataclass(frozen=True)
class CppKernel:
    """See docs/kernels.md."""

    name: str = "cpp"
    label: str = "cpp"
    only_measured: bool = False
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
        if problem.requires_grad and fills_rows(problem.spec):
            return FILLED_ROWS
        made_for = configuration_of(problem)
        try:
            compiler()
            gradient_source_of(made_for) if trains(problem) else source_of(made_for)
        except (NoCode, CannotBuild) as error:
            return str(error)
        return None

    def cost(self, problem: Problem) -> float:
        """The blocks that are attended to."""
        _, rows, columns = problem.shape.hints
        mask = problem.spec.mask
        attended = density(block_structure(mask, rows, columns, *BLOCK, problem.param_hints))
        return problem.work(attended) * _TIME[problem.dtype]

    def prepare(self, problem: Problem) -> None:
        made_for = configuration_of(problem)
        start_building(source_of(made_for))
        if trains(problem):
            start_building(gradient_source_of(made_for))

    def source(self, problem: Problem) -> str | None:
        made_for = configuration_of(problem)
        forward = source_of(made_for)
        return f"{forward}\n{gradient_source_of(made_for)}" if trains(problem) else forward

    def build(self, problem: Problem) -> Attention:
        plan = plan_of(problem)
        runner = cpp_runner(plan)  # built now: a failure must be known before the graph is written
        if not trains(problem):
            return op_call(plan)
        runner.build_backward()
        return training_call(plan, problem.spec.dropout_p)


def trains(problem: Problem) -> bool:
    """Whether it takes the op that has a gradient and dropout."""
    return problem.requires_grad or problem.spec.dropout_p > 0
