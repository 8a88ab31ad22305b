"""The specs of `specs.py` as problems that flex_attention takes on a GPU."""

from __future__ import annotations

import torch
from specs import SPECS

from adaattn_compiler.kernels.problem import Problem, Shape


def problem_on_a_gpu(name: str, length: int = 500, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Of B2 H4 and so many rows and keys."""
    spec, shapes, params = SPECS[name]
    sizes = (4, 4 // spec.group, length, length, 64, 64)
    grown = tuple(tuple(length if n == 90 else n for n in shape) for shape in shapes)
    shape = Shape(2, *sizes, (2, length, length))
    return Problem(spec, shape, dtype, "cuda", False, grown, params)
