"""A policy's decisions as a kernel for GPUs (kernels/problem.py); why it cannot take a problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.decision import BLOCK, HeadDecision
from adaattn_compiler.kernels import decided_op
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.decided_kernel import (
    AUDIT_ERROR,
    GRADIENT_WANTED,
    bounds_by_head,
    envelope_refusal,
)
from adaattn_compiler.kernels.envelope import names
from adaattn_compiler.kernels.low_rank import low_rank_refusal
from adaattn_compiler.kernels.problem import Attention, Problem, Sizes
from adaattn_compiler.kernels.triton.decided_plan import (
    base_of,
    decisions_of,
    is_low_rank,
    is_sparse,
)
from adaattn_compiler.kernels.triton.kernel import TritonKernel
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.plan import FEW_ROWS, tiles_for
from adaattn_compiler.policy import SitePolicy
from adaattn_compiler.spec import EmptyRow, Load
from adaattn_compiler.target import DeviceTarget

# The ops must be registered wherever the kernel may be chosen.
OPS = (decided_op.check_envelope, decided_op.attention_as_decided)

# What of a head's decision is known here; a policy that says more is not for these kernels.
_KNOWN = {"pattern", "selection", "pooling", "nystrom", "basis", "scores", "values", "skip"}


@dataclass(frozen=True)
class DecidedGpuKernel:
    """See the module's docstring. rows: how many query rows each call audits."""

    site: SitePolicy
    rows: int
    target: DeviceTarget
    name: str = "triton"
    label: str = "triton by policy"
    only_measured: bool = False
    seconds_to_build: float = 6.0

    def refusal(self, problem: Problem) -> str | None:
        if problem.requires_grad:
            return GRADIENT_WANTED
        exact = TritonKernel(self.target).refusal(problem)
        if exact is not None:
            return exact
        unknown = envelope_refusal(self.site)
        return unknown or decision_refusal(problem, self.site.decision.heads, self.target)

    def cost(self, problem: Problem) -> float:
        return TritonKernel(self.target).cost(problem)

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        text = self.plan(problem).serialize()
        found = decisions_of(text, wide(problem))
        return "\n".join((*found.attention.sources(), *found.audit.sources()))

    def plan(self, problem: Problem) -> DecidedPlan:
        """As the graph will carry it."""
        statistics, heads = self.site.envelope.statistics, self.site.decision.heads
        bounds = [bounds_by_head(statistics.get(name, ()), self.site) for name in names()]
        low, high = zip(*bounds, strict=True)
        tiles = tiles_by_decision(problem, heads, self.target)
        assert tiles is not None  # `refusal` looks
        return DecidedPlan(
            base=base_of(problem, tiles, self.target, self.rows),
            heads=heads,
            low=low,
            high=high,
            limit=bounds_by_head(statistics.get(AUDIT_ERROR, ()), self.site)[1],
            budgets=self.site.budget,
            rows=self.rows,
        )

    def build(self, problem: Problem) -> Attention:
        text = self.plan(problem).serialize()
        decisions_of(text, wide(problem))

        def attention(
            q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
        ) -> Any:
            qkv = (q_BHMD, k_BGND, v_BGNE)
            flags = torch.ops.adaattn.check_envelope(*qkv, sizes.state, text)
            return torch.ops.adaattn.attention_as_decided(
                *qkv, list(operands), list(sizes.params), flags, sizes.state, text
            )

        return attention


def wide(problem: Problem) -> bool:
    """Whether products may be of fewer bits than the tensors have."""
    return problem.dtype == torch.float32


def decision_refusal(
    problem: Problem, heads: Sequence[HeadDecision], target: DeviceTarget
) -> str | None:
    """Why these decisions do not go with a problem, whatever is exact about it."""
    spec, rows = problem.spec, problem.shape.rows
    unknown = [name for head in heads for name in _unknown(head)]
    if unknown:
        return f"no kernel of ours has {unknown[0]!r} on GPUs"
    if rows is not None and rows <= FEW_ROWS:
        return f"{FEW_ROWS} query rows or fewer are computed exactly on GPUs"
    if spec.masks_by_data and spec.empty_row not in (EmptyRow.IMPOSSIBLE, EmptyRow.ZERO):
        return "rows that may be without a key, and then not 0, cannot be audited"
    if any(map(is_sparse, heads)) and spec.mask.has(Load):
        return "the mask depends on the input: a pattern might leave a row without a key"
    if refused := low_rank_refusal(problem, heads):
        return refused
    if any((head.pooling or head.nystrom) and head.skip for head in heads):
        return "no kernel of ours skips blocks beside means on GPUs"
    if not wide(problem) and not any(map(_saves_work, heads)):
        return f"{problem.dtype} is multiplied as it is: nothing in the policy is faster on GPUs"
    if tiles_by_decision(problem, heads, target) is None:
        return f"no tile of head dimension {problem.shape.head_dim} holds the keys of a mean"
    return None


def _saves_work(head: HeadDecision) -> bool:
    """Whether a head does less than all products, whatever their precision."""
    return is_sparse(head) or is_low_rank(head) or head.skip is not None


def _unknown(head: HeadDecision) -> list[str]:
    """The fields that say something which is not known here."""
    plain = HeadDecision()
    return [
        field.name
        for field in dataclasses.fields(head)
        if field.name not in _KNOWN and getattr(head, field.name) != getattr(plain, field.name)
    ]


def tiles_by_decision(
    problem: Problem, heads: Sequence[HeadDecision], target: DeviceTarget
) -> Tiles | None:
    """The likeliest tiles for a device; of whole parts of a pattern's blocks where there are any,
    and of whole means."""
    sparse = any(map(is_sparse, heads))
    mean = max((head.pooling.keys for head in heads if head.pooling is not None), default=1)
    for tiles in tiles_for(problem, target):
        parts = BLOCK % tiles.rows == 0 and BLOCK % tiles.keys == 0
        if (parts or not sparse) and tiles.keys % mean == 0:
            return _with_room(tiles, problem, target)
    return None


def _with_room(tiles: Tiles, problem: Problem, target: DeviceTarget) -> Tiles:
    """With registers for two ways through the keys in one program: otherwise they spill there."""
    widest = max(problem.shape.head_dim, problem.shape.value_dim)
    assert target.capability is not None
    if widest > 64 and target.capability < (9, 0):
        return dataclasses.replace(tiles, warps=8)
    return tiles
