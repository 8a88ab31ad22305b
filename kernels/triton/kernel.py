"""The generated Triton kernel, as one that can be chosen (kernels/problem.py)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.kernels.blocks import block_structure, density
from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.problem import Attention, Problem, Sizes
from adaattn_compiler.kernels.through_op import code_refusal
from adaattn_compiler.kernels.triton.launch_backward import gradient_refusal
from adaattn_compiler.kernels.triton.op import DTYPES
from adaattn_compiler.kernels.triton.plan import (
    FEW_ROWS,
    TritonPlan,
    configuration_of,
    plan_of,
    tiles_for,
)
from adaattn_compiler.kernels.triton.source import forward_source
from adaattn_compiler.target import DeviceTarget

WIDEST_HEAD = 256
# Positions are 32-bit in the generated code.
LONGEST = 1 << 30
LEAST_CAPABILITY = (8, 0)
# Beside SDPA's own, where nothing was measured.
_TIME, _TIME_OF_FEW_ROWS, _LESS_LIKELY = 1.2, 0.8, 0.01


@dataclass(frozen=True)
class TritonKernel:
    """See docs/kernels.md. variant: which of the tiles for the device, the likeliest first."""

    target: DeviceTarget
    variant: int = 0
    name: str = "triton"
    seconds_to_build: float = 3.0
    only_measured: bool = False

    @property
    def label(self) -> str:
        return self.name if self.variant == 0 else f"{self.name}:{self.variant}"

    def refusal(self, problem: Problem) -> str | None:
        refused = _refusal(problem, self.target)
        if refused is None and self.variant >= len(tiles_for(problem, self.target)):
            return "no more tiles to try"
        return refused

    def cost(self, problem: Problem) -> float:
        """The blocks that are attended to; among tiles, the likeliest first."""
        _, rows, columns = problem.shape.hints
        tiles = tiles_for(problem, self.target)[0]
        sizes = (rows, columns, tiles.rows, tiles.keys)
        attended = _attended(problem.spec.mask, sizes, problem.param_hints)
        factor = _TIME_OF_FEW_ROWS if rows <= FEW_ROWS else _TIME
        return problem.work(attended) * (factor + _LESS_LIKELY * self.variant)

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        plan = plan_of(problem, tiles_for(problem, self.target)[self.variant], self.target)
        return "\n".join(plan.sources())

    def build(self, problem: Problem) -> Attention:
        plan = plan_of(problem, tiles_for(problem, self.target)[self.variant], self.target)
        text = plan.serialize()

        def attention(
            q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
        ) -> Any:
            tables: list[Any] = []
            if plan.listed:
                tables = _tables(sizes, plan, q_BHMD)
            given = (q_BHMD, k_BGND, v_BGNE, list(operands), list(sizes.params), tables, text)
            if problem.requires_grad:
                return torch.ops.adaattn.triton_attention_training(*given)[0]
            return torch.ops.adaattn.triton_attention(*given)

        return attention


@functools.lru_cache(maxsize=64)
def _attended(mask: Any, sizes: tuple[int, int, int, int], params: tuple[int, ...]) -> float:
    """The share of blocks that a mask leaves, of M, N and a tile's rows and keys."""
    return density(block_structure(mask, *sizes, params))


def _tables(sizes: Sizes, plan: TritonPlan, like: Any) -> list[Any]:
    """The tables of a plan, written once for all sites of a graph that share them."""
    key = ("triton tables", plan, sizes.rows, sizes.columns)
    if key not in sizes.memo:
        found = torch.ops.adaattn.triton_tables(like, sizes.rows, sizes.columns, plan.serialize())
        count = 2 if plan.backward is None else 6
        sizes.memo[key] = [found[i] for i in range(count)]
    tables: list[Any] = sizes.memo[key]
    return tables


def _refusal(problem: Problem, target: DeviceTarget) -> str | None:
    spec, shape = problem.spec, problem.shape
    if problem.device != "cuda":
        return "only on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if target.capability is None or target.capability < LEAST_CAPABILITY:
        return f"not for {target.name}: sm_80 and later"
    if problem.dtype not in DTYPES:
        return f"not for {problem.dtype}"
    if max(shape.head_dim, shape.value_dim) > WIDEST_HEAD:
        return f"not for head dimensions above {WIDEST_HEAD}"
    if max(shape.hints) > LONGEST:
        return f"not for lengths above {LONGEST}"
    if spec.dropout_p > 0:
        return "no dropout"
    if problem.requires_grad and (refused := gradient_refusal(spec)):
        return refused
    if refused := code_refusal(problem):
        return refused
    try:
        forward_source(configuration_of(problem))
    except NoCode as error:
        return str(error)
    return None
