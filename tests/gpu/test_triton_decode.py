"""The generated kernels for few query rows on the device, against float64 there."""

from __future__ import annotations

import dataclasses

import pytest
from on_gpu import Given, poisoned, sized

from adaattn_compiler.kernels.triton.launch_decode import decode

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("splits", [1, 4, 7])
@pytest.mark.parametrize(("group", "rows"), [(1, 1), (4, 1), (2, 3)])
def test_decoding_is_right(group: int, rows: int, splits: int) -> None:
    problem = sized("last rows", rows, 2500, (128, 128))
    spec = dataclasses.replace(problem.spec, group=group)
    shape = dataclasses.replace(problem.shape, kv_heads=4 // group)
    given = Given.of(dataclasses.replace(problem, spec=spec, shape=shape))
    with poisoned():
        ours = decode(given.made_for, *given.qkv, given.operands, splits=splits)
    given.assert_accurate(ours)
