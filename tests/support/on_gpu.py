"""What tests on a device share; importing it needs none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from check import assert_as_accurate
from specs import problem_of, random_inputs

from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.triton.launch import Tiles, forward
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.spec import EmptyRow

# For float32, for wide heads, and for the rest.
FLOAT_TILES, WIDE_TILES, TILES = Tiles(32, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 3)


def on_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors there, laid out as they are."""
    return [tensor.to("cuda") for tensor in tensors]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is new is full of NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclasses.dataclass(frozen=True)
class Given:
    """A problem with its tensors on the device."""

    problem: Problem
    qkv: Sequence[torch.Tensor]
    operands: Sequence[torch.Tensor]

    @staticmethod
    def of(problem: Problem, seed: int = 0) -> Given:
        return Given(problem, *(on_device(part) for part in random_inputs(problem, seed)))

    @property
    def made_for(self) -> Configuration:
        dtypes = (str(operand.dtype).removeprefix("torch.") for operand in self.operands)
        return Configuration(self.problem.spec, tuple(dtypes))

    def through(self, **how: Any) -> torch.Tensor:
        """By our kernel, what it leaves unwritten being NaN."""
        wide = self.problem.shape.head_dim > 128
        tiles = WIDE_TILES if wide else TILES
        if self.problem.dtype == torch.float32:
            tiles = FLOAT_TILES
        how = {"tiles": tiles, **how}
        with poisoned():
            return forward(self.made_for, *self.qkv, self.operands, self.problem.param_hints, **how)

    def by_oracle(self, dtype: torch.dtype) -> torch.Tensor:
        qkv = [tensor.to(dtype) for tensor in self.qkv]
        extra = [o.to(dtype) if o.is_floating_point() else o for o in self.operands]
        return reference_attention(*qkv, extra, self.problem.param_hints, self.problem.spec)

    def assert_accurate(self, ours: torch.Tensor) -> None:
        exact = self.by_oracle(torch.float64)
        assert_as_accurate(ours, self.by_oracle(self.problem.dtype), exact)


def sized(
    name: str, rows: int, columns: int, dims: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> Problem:
    """A problem of specs.py at another size, with rows that may have no key."""
    problem = problem_of(name, dtype, rows=rows, columns=columns)
    shape = dataclasses.replace(problem.shape, head_dim=dims[0], value_dim=dims[1])
    spec = problem.spec
    if spec.empty_row is EmptyRow.IMPOSSIBLE and rows > columns:
        spec = dataclasses.replace(spec, empty_row=EmptyRow.ZERO)
    return dataclasses.replace(problem, shape=shape, spec=spec)
