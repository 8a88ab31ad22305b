"""A site that decides for itself, as a kernel (kernels/problem.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.kernels import online_op
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.cpu.runner import plan_of
from adaattn_compiler.kernels.decided_kernel import decision_refusal
from adaattn_compiler.kernels.online import OnlinePlan
from adaattn_compiler.kernels.online_candidates import online_candidates
from adaattn_compiler.kernels.online_runner import online_runner
from adaattn_compiler.kernels.problem import Attention, Problem, Sizes

# The op must be registered wherever the kernel may be chosen.
OPS = (online_op.attention_online,)


@dataclass(frozen=True)
class OnlineKernel:
    """See kernels/online.py; budget, calls, rows and heuristic are those of its plan."""

    budget: float
    calls: int
    rows: int
    heuristic: str | None = None
    name: str = "cpp"
    label: str = "cpp online"
    only_measured: bool = False
    seconds_to_build: float = 4.0

    def refusal(self, problem: Problem) -> str | None:
        refused = CppKernel().refusal(problem) or decision_refusal(problem, ())
        if refused is None and not online_candidates(problem, self.heuristic):
            return "no kernel of ours has anything less exact for it"
        return refused

    def cost(self, problem: Problem) -> float:
        return CppKernel().cost(problem)

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return CppKernel().source(problem)

    def plan(self, problem: Problem) -> OnlinePlan:
        """As the graph will carry it."""
        return OnlinePlan(
            base=plan_of(problem, mixed=problem.dtype == torch.float32),
            heads=problem.shape.heads,
            candidates=online_candidates(problem, self.heuristic),
            budget=self.budget,
            calls=self.calls,
            rows=self.rows,
            heuristic=self.heuristic,
        )

    def build(self, problem: Problem) -> Attention:
        text = self.plan(problem).serialize()
        online_runner(text)  # built now: a failure must be known before the graph is written

        def attention(
            q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
        ) -> Any:
            return torch.ops.adaattn.attention_online(
                q_BHMD, k_BGND, v_BGNE, list(operands), list(sizes.params), sizes.state, text
            )

        return attention
