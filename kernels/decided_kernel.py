"""A policy's decisions as a kernel (kernels/problem.py), and why it cannot take a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.decision import HeadDecision, Precision
from adaattn_compiler.kernels import decided_op
from adaattn_compiler.kernels.cpu.decided import decided_runner
from adaattn_compiler.kernels.cpu.decided_lists import decisions_at
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.cpu.runner import plan_of
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.envelope import names
from adaattn_compiler.kernels.low_rank import low_rank_refusal
from adaattn_compiler.kernels.problem import Attention, Problem, Sizes
from adaattn_compiler.policy import Range, SitePolicy
from adaattn_compiler.spec import EmptyRow, Load

# The ops must be registered wherever the kernel may be chosen.
OPS = (decided_op.guarded_attention,)

# The statistic of an envelope that each call's audit is held to, by head; not one of the inputs.
AUDIT_ERROR = "audit_error"

_PRECISIONS = (Precision.FP32, Precision.BF16)

GRADIENT_WANTED = (
    "policies and mode='online' are for inference; a gradient is wanted here: call the model under "
    "torch.no_grad() or torch.inference_mode(), or train it without them"
)
_DROPOUT_ON = (
    "policies and mode='online' are for inference; dropout is on here: call model.eval() first"
)


@dataclass(frozen=True)
class DecidedKernel:
    """See the module's docstring. rows: how many query rows each call audits."""

    site: SitePolicy
    rows: int
    name: str = "cpp"
    label: str = "cpp by policy"
    only_measured: bool = False
    seconds_to_build: float = 4.0

    def refusal(self, problem: Problem) -> str | None:
        exact = CppKernel().refusal(problem)
        if exact is not None:
            return exact
        unknown = envelope_refusal(self.site)
        return unknown or decision_refusal(problem, self.site.decision.heads)

    def cost(self, problem: Problem) -> float:
        return CppKernel().cost(problem)

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return CppKernel().source(problem)

    def plan(self, problem: Problem) -> DecidedPlan:
        """As the graph will carry it."""
        statistics = self.site.envelope.statistics
        bounds = [bounds_by_head(statistics.get(name, ()), self.site) for name in names()]
        low, high = zip(*bounds, strict=True)
        return DecidedPlan(
            base=plan_of(problem, mixed=problem.dtype == torch.float32),
            heads=self.site.decision.heads,
            low=low,
            high=high,
            limit=bounds_by_head(statistics.get(AUDIT_ERROR, ()), self.site)[1],
            budgets=self.site.budget,
            rows=self.rows,
        )

    def applied(self, problem: Problem) -> tuple[tuple[HeadDecision, ...], str]:
        """What the heads do at the lengths of the problem, and why where that is not all."""
        _, rows, columns = problem.shape.hints
        heads = self.site.decision.heads
        return decisions_at(problem.spec, heads, (rows, columns), problem.param_hints)

    def build(self, problem: Problem) -> Attention:
        text = self.plan(problem).serialize()
        decided_runner(text)  # built now: a failure must be known before the graph is written

        def attention(
            q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
        ) -> Any:
            return torch.ops.adaattn.guarded_attention(
                q_BHMD, k_BGND, v_BGNE, list(operands), list(sizes.params), sizes.state, text
            )

        return attention


def decision_refusal(problem: Problem, heads: Sequence[HeadDecision]) -> str | None:
    """Why these decisions do not go with a problem, whatever is exact about it."""
    spec = problem.spec
    if problem.requires_grad:
        return GRADIENT_WANTED
    if spec.dropout_p > 0:
        return _DROPOUT_ON
    reason = low_rank_refusal(problem, heads)
    if reason is not None:
        return reason
    if any(p not in _PRECISIONS for head in heads for p in (head.scores, head.values)):
        return "precisions on the CPU are fp32 and bf16"
    if spec.masks_by_data and spec.empty_row not in (EmptyRow.IMPOSSIBLE, EmptyRow.ZERO):
        return "rows that may be without a key, and then not 0, cannot be audited"
    sparse = any(head.pattern or head.selection or head.pooling for head in heads)
    if sparse and spec.mask.has(Load):
        return "the mask depends on the input: a pattern might leave a row without a key"
    return None


def envelope_refusal(site: SitePolicy) -> str | None:
    """Why an envelope cannot be checked: a statistic that nothing computes would guard nothing."""
    known = (*names(), AUDIT_ERROR)
    unknown = [name for name in site.envelope.statistics if name not in known]
    if not unknown:
        return None
    return f"its envelope has the unknown statistic {unknown[0]!r}; known are {', '.join(known)}"


def bounds_by_head(ranges: Sequence[Range], site: SitePolicy) -> tuple[tuple[float, ...], ...]:
    """(low, high) by query head; without ranges everything is let through."""
    if not ranges:
        return ((float("-inf"),) * site.heads, (float("inf"),) * site.heads)
    group = site.heads // len(ranges)
    low = tuple(r.low for r in ranges for _ in range(group))
    return low, tuple(r.high for r in ranges for _ in range(group))
