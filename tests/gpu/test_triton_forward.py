"""The generated kernels on the device, forward, against float64 there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from on_gpu import Given, sized
from specs import SPECS, problem_of

from adaattn_compiler.kernels.reference import attention_by_rows
from adaattn_compiler.kernels.triton.launch import Tiles

pytestmark = pytest.mark.gpu

# Types of the inputs, and how products of float32 are made.
PRECISIONS = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32x3"),
]


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_feature_is_as_accurate_as_eager(name: str, dtype: torch.dtype, precision: str) -> None:
    given = Given.of(problem_of(name, dtype))
    given.assert_accurate(given.through(precision=precision))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "dims"),
    [
        ("causal", 1000, 1000, (128, 128)),
        ("window", 1000, 1000, (128, 128)),
        ("gqa", 2048, 2048, (64, 64)),
        ("softcap", 1000, 1000, (64, 64)),
        ("sink", 1000, 1000, (64, 64)),
        ("plain", 333, 4097, (64, 64)),
        ("last rows", 1, 4096, (128, 128)),
        ("causal", 600, 600, (256, 256)),
    ],
)
def test_larger_sizes_are_right(name: str, rows: int, columns: int, dims: tuple[int, int]) -> None:
    given = Given.of(sized(name, rows, columns, dims))
    given.assert_accurate(given.through())


@pytest.mark.parametrize(
    ("rows", "columns", "dims"),
    [
        (1, 1, (16, 16)),
        (33, 65, (40, 24)),
        (31, 64, (72, 128)),
        (1, 130, (128, 16)),
        (70, 3, (33, 7)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_odd_sizes_are_right(
    rows: int, columns: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    given = Given.of(sized("last rows", rows, columns, dims, dtype))
    given.assert_accurate(given.through())


@pytest.mark.parametrize(
    "tiles", [Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)]
)
@pytest.mark.parametrize("lazy", [False, True])
def test_each_tiling_is_right(tiles: Tiles, lazy: bool) -> None:
    given = Given.of(sized("causal", 1000, 1000, (128, 128)))
    given.assert_accurate(given.through(tiles=tiles, **({"lazy": True} if lazy else {})))


@pytest.mark.parametrize("name", ["causal", "window", "sink", "alibi", "padding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_log_sum_exp_is_that_of_the_scores(name: str, dtype: torch.dtype) -> None:
    given = Given.of(problem_of(name, dtype))
    shape = given.qkv[0].shape[:3]
    lse = torch.full(shape, float("nan"), device="cuda")
    given.through(lse=lse)
    assert torch.allclose(lse.double(), _exact_lse(given), atol=1e-3, rtol=1e-5)


def _exact_lse(given: Given) -> torch.Tensor:
    problem = given.problem
    exact = torch.empty(given.qkv[0].shape[:3], device="cuda", dtype=torch.float64)
    qkv = [tensor.double() for tensor in given.qkv]
    extra = [o.double() if o.is_floating_point() else o for o in given.operands]
    attention_by_rows(*qkv, extra, problem.param_hints, problem.spec, lse=exact)
    return exact


def test_same_call_gives_the_same_bits() -> None:
    given = Given.of(sized("causal", 1000, 1000, (64, 64)))
    first = given.through()
    assert all(torch.equal(first, given.through()) for _ in range(10))


def test_strided_inputs_are_read_where_they_lie() -> None:
    given = Given.of(sized("gqa", 200, 200, (64, 64)))
    apart = [torch.cat([t, t], -1).repeat_interleave(2, 2)[:, :, ::2, :64] for t in given.qkv]
    ours = dataclasses.replace(given, qkv=apart).through()
    assert torch.equal(ours, given.through())


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_comes_through(where: str) -> None:
    given = Given.of(sized("causal", 200, 200, (64, 64)))
    # In the first block of keys, which all rows meet: eager has NaN of a masked value, too.
    given.qkv["qkv".index(where)][0, 1, 20] = float("nan")
    eager = given.by_oracle(torch.float32).isnan().any(-1)
    assert eager.any()
    assert torch.equal(given.through().isnan().any(-1), eager)
