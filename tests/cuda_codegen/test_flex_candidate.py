"""flex_attention as a candidate on GPUs: what Inductor writes, and what that is called with."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flex_interpreted
import pytest
import torch
from check import assert_as_accurate
from cuda_capture import cuda, fake_gpu
from flex_problems import problem_on_a_gpu
from flex_without_gpu import Written, flex_code, runner_without_code
from specs import oracle

from adaattn_compiler.kernels.flex import FlexKernel
from adaattn_compiler.kernels.flex_inductor import FlexVariant
from adaattn_compiler.kernels.triton.compile import Compiled, compiled_forward
from adaattn_compiler.kernels.triton.disassembly import product_loops
from adaattn_compiler.kernels.triton.plan import configuration_of, tiles_for
from adaattn_compiler.target import target_named

# What of a spec shows in the kernel.
CASES = {
    "causal": "mask_mod_output",
    "window": "tl.full([1], 39, tl.int32)",
    "softcap": "libdevice.tanh",
    "sink": "tl.where",
    "dense bias": "tl.load(in_ptr9",
    "gqa": "GQA_SHARED_HEADS : tl.constexpr = 2",
    "prefix at run time": "tl.load(in_ptr9",
}


@pytest.fixture(scope="module")
def code() -> Callable[[str], Written]:
    """What is written for a spec, once for all tests."""
    found: dict[str, Written] = {}

    def written(name: str) -> Written:
        if name not in found:
            problem = problem_on_a_gpu(name)
            assert FlexKernel.on_gpus().refusal(problem) is None
            found[name] = flex_code(problem)
        return found[name]

    return written


@pytest.mark.parametrize("name", CASES)
def test_one_kernel_and_nothing_else_is_launched(name: str, code: Callable[[str], Written]) -> None:
    calls = code(name).calls
    assert calls.count(".run(") == 1
    assert "torch.ops" not in calls
    assert "copy_" not in calls
    # [B,M,H,E] in memory, beside LSE and maximum, which nobody writes.
    assert "(256*s" in calls.split("torch.bfloat16", 1)[0].rsplit("empty_strided_cuda", 1)[1]
    assert CASES[name] in code(name).kernel


def test_scores_stay_in_float32(code: Callable[[str], Written]) -> None:
    scores = code("softcap").kernel.split("post_mod_scores = tmp", 1)[0].rsplit("qk *=", 1)[1]
    assert "bfloat16" not in scores


def test_loads_are_as_wide_as_they_can_be(code: Callable[[str], Written]) -> None:
    kernel = code("causal").kernel
    for tensor in "qkv":
        line = next(line for line in kernel.splitlines() if f"stride_{tensor}z, stride" in line)
        assert line.count("16*ks") == 3
    assert "INDEX_DTYPE : tl.constexpr = tl.int32" in kernel


@pytest.mark.parametrize("name", ["causal", "dense bias"])
def test_kernel_compiles(name: str, code: Callable[[str], Written]) -> None:
    compiled = code(name).compiled(90)
    for instruction in ("wgmma", "cp.async"):
        assert instruction in compiled.ptx


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "window", "softcap"])
def test_generated_kernel_takes_fewer_instructions_for_a_score(name: str, head_dim: int) -> None:
    """Beside what torch's template takes with its own tiles, in whole blocks and in others."""
    problem = problem_on_a_gpu(name, 4096)
    shape = dataclasses.replace(problem.shape, head_dim=head_dim, value_dim=head_dim)
    problem = dataclasses.replace(problem, shape=shape)
    written = flex_code(problem)
    sizes = [
        int(re.findall(rf"BLOCK_{axis} : tl.constexpr = (\d+)", written.kernel)[0]) for axis in "MN"
    ]
    flex = for_a_score(written.compiled(90), *sizes, written.warps)
    tiles = tiles_for(problem, target_named("sm_90"))[0]
    switches = {"has_lse": False, "has_statistics": False, "ragged": False}
    dims = (head_dim, head_dim)
    made_for = configuration_of(problem)
    compiled = compiled_forward(made_for, "bfloat16", dims, tiles, 90, **switches)
    ours = for_a_score(compiled, tiles.rows, tiles.keys, tiles.warps)
    # Torch's template meets those that are cut first.
    print(f"{name} D {head_dim}: {ours} of whole and cut blocks, of torch's template {flex[::-1]}")
    assert ours[0] < 0.9 * flex[1]
    assert ours[1] < 1.1 * flex[0]


def for_a_score(built: Compiled, rows: int, keys: int, warps: int) -> list[float]:
    scores = rows * keys / (32 * warps)
    return [round(loop.count / scores, 1) for loop in product_loops(built.cubin)]


def test_lengths_of_whole_blocks_are_not_checked() -> None:
    assert "IS_DIVISIBLE : tl.constexpr = True" in flex_code(problem_on_a_gpu("gqa", 512)).kernel


@pytest.mark.parametrize(
    ("name", "batch", "wide"), [("sink", 2, False), ("dense bias", 2, False), ("gqa", 40000, True)]
)
def test_a_call_takes_everything_on_the_device(name: str, batch: int, wide: bool) -> None:
    problem = problem_on_a_gpu(name)
    shape = problem.shape
    with runner_without_code(problem) as (runner, given), fake_gpu():
        operands = [cuda(*size, dtype=torch.float32) for size in problem.operand_shapes]
        q = cuda(batch, 500, 4, 64).transpose(1, 2)
        k, v = (cuda(batch, 500, shape.kv_heads, 3 * 64)[..., 64:128].transpose(1, 2),) * 2
        out = runner(q, k, v, operands, [])
    (tensors,) = given
    assert {t.device.type for t in tensors} == {"cuda"}
    _, partial, _, full = tensors[3:7]
    assert partial.shape == full.shape
    if problem.spec.sink is None:
        assert tensors[1] is k  # strides are multiples of 16: no copy
    assert all(stride % 16 == 0 for t in tensors[:3] for stride in t.stride()[:-1])
    assert out.shape == q.shape
    assert (FlexVariant(q.device, wide=True) in runner._calls) == wide


def test_wide_tensors_take_offsets_of_64_bits() -> None:
    written = flex_code(problem_on_a_gpu("causal"), wide=True)
    assert "INDEX_DTYPE : tl.constexpr = tl.int64" in written.kernel
    assert "'ks0': 'i64'" in written.kernel


def test_what_is_written_is_as_accurate_as_eager(tmp_path: Path) -> None:
    """In Triton's interpreter, with lengths of whole blocks and others."""
    lengths = {"window": 300, "gqa": 256, "sink": 256, "dense bias": 150}
    problems = {name: problem_on_a_gpu(name, n, torch.float32) for name, n in lengths.items()}
    codes = {name: flex_code(problem) for name, problem in problems.items()}
    files = tmp_path / "written", tmp_path / "results"
    torch.save({n: (lengths[n], code.kernel, code.calls) for n, code in codes.items()}, files[0])
    subprocess.run(
        [sys.executable, flex_interpreted.__file__, *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    for name, found in torch.load(files[1]).items():
        exact, eager = (oracle(problems[name], t) for t in (torch.float64, torch.float32))
        assert_as_accurate(found, eager, exact)
