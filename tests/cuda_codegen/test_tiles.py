"""All tiles that a plan may take, compiled by the Triton of GPU machines: none spills registers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flex_problems import problem_on_a_gpu

from adaattn_compiler.kernels.triton.compile import compiled_forward
from adaattn_compiler.kernels.triton.plan import configuration_of, tiles_for
from adaattn_compiler.target import target_named

SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sink", torch.bfloat16), ("distance", torch.bfloat16), ("causal", torch.float32)],
    ids=str,
)
def test_tiles_of_plans_fit(name: str, dtype: torch.dtype, width: int, capability: int) -> None:
    problem = problem_on_a_gpu(name, 4096, dtype)
    shape = dataclasses.replace(problem.shape, head_dim=width, value_dim=width)
    problem = dataclasses.replace(problem, shape=shape)
    every = tiles_for(problem, target_named(f"sm_{capability}"))
    assert every
    text = str(dtype).removeprefix("torch.")
    for tiles in every:
        for ragged in (False, True):
            made_for = configuration_of(problem)
            built = compiled_forward(made_for, text, (width,) * 2, tiles, capability, ragged=ragged)
            assert built.spills == 0, tiles
            assert built.shared_memory <= SHARED[capability], tiles
