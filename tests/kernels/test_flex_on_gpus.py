"""flex_attention as a candidate on GPUs, as far as no CUDA build of torch is needed."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from specs import problem_of, random_inputs

from adaattn_compiler.kernels import ops
from adaattn_compiler.kernels.choose import kernels
from adaattn_compiler.kernels.flex import FlexKernel, flex_runner, plan_of
from adaattn_compiler.kernels.flex_gpu import StagedInputs, is_wide, with_aligned_strides
from adaattn_compiler.kernels.flex_runner import FlexRunner, _first_variant
from adaattn_compiler.kernels.problem import Problem


def on_a_gpu(name: str, **changes: Any) -> Problem:
    return dataclasses.replace(problem_of(name, torch.bfloat16), device="cuda", **changes)


def with_shape(name: str, **changes: Any) -> Problem:
    problem = on_a_gpu(name)
    return dataclasses.replace(problem, shape=dataclasses.replace(problem.shape, **changes))


def test_flex_competes_on_gpus_where_it_can_be_measured() -> None:
    (candidate,) = (kernel for kernel in kernels("cuda") if kernel.name == "flex")
    assert candidate.only_measured
    assert candidate.refusal(on_a_gpu("causal")) is None
    assert candidate.refusal(problem_of("causal")) == "only on CUDA"
    (on_cpu,) = (kernel for kernel in kernels() if kernel.name == "flex")
    assert not on_cpu.only_measured
    assert on_cpu.refusal(on_a_gpu("causal")) == "only on the CPU"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name", ["plain", "window", "softcap", "sink", "dense bias", "gqa", "padding", "per head"]
)
def test_flex_takes_any_mask_score_and_sink(name: str, dtype: torch.dtype) -> None:
    assert FlexKernel.on_gpus().refusal(on_a_gpu(name, dtype=dtype)) is None


def with_dropout() -> Problem:
    problem = on_a_gpu("causal")
    return dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, dropout_p=0.1))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (on_a_gpu("causal", requires_grad=True), "no backward here"),
        (with_dropout(), "no dropout"),
        (on_a_gpu("causal", dtype=torch.float64), "not for torch.float64"),
        (on_a_gpu("causal padding uniform"), "a row without a key is 0"),
        (on_a_gpu("causal padding nan"), "a row without a key is 0"),
        (with_shape("causal", head_dim=72), "not for a head dimension of 72"),
        (with_shape("causal", value_dim=8), "not for a head dimension of 8"),
        (with_shape("causal", head_dim=512), "not for a head dimension of 512"),
        (with_shape("causal", batch=70000, hints=(70000, 90, 90)), "not for a batch of 70000"),
        (
            with_shape("last rows", rows=1, columns=None, hints=(2, 1, 90)),
            "few rows, and block lists made on the host for each number of keys",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flex_refuses(problem: Problem, reason: str) -> None:
    assert FlexKernel.on_gpus().refusal(problem) == reason


def test_plan_says_for_which_device_and_whether_blocks_are_whole() -> None:
    assert plan_of(problem_of("causal")) != plan_of(on_a_gpu("causal", dtype=torch.float32))
    assert "'whole': False" in plan_of(on_a_gpu("causal"))
    for name, whole in (("causal", True), ("sink", False)):  # the sink is one key more
        problem = with_shape(name, rows=256, columns=256, hints=(2, 256, 256))
        assert f"'whole': {whole}" in plan_of(problem)
        unknown = with_shape(name, rows=None, columns=256, hints=(2, 256, 256))
        assert "'whole': False" in plan_of(unknown)


def test_what_is_staged_comes_back_aligned() -> None:
    counts = torch.tensor([[[1, 2, 1]]], dtype=torch.int32)
    narrow = torch.tensor([[[[4], [5], [6]]]], dtype=torch.int32)
    wide = torch.arange(9, dtype=torch.int32).reshape(1, 1, 3, 3)
    staged = StagedInputs.of((counts, wide, counts + 1, narrow), (7, 2**40))
    lists, numbers = staged.on(torch.device("cpu"))
    assert [int(n) for n in numbers] == [7, 2**40]
    assert all(n.dim() == 0 and n.dtype == torch.int64 for n in numbers)
    assert torch.equal(lists[0], counts)
    assert torch.equal(lists[1], wide)
    assert torch.equal(lists[2], counts + 1)
    assert lists[3].shape == wide.shape  # the template of torch 2.11 takes both for equally wide
    assert torch.equal(lists[3][..., :1], narrow)
    starts = [t.storage_offset() * t.element_size() for t in (*lists, *numbers)]
    assert all(start % 16 == 0 for start in starts)
    assert all(t.is_contiguous() for t in lists)
    assert StagedInputs.of((counts, wide, counts, narrow), ()).on(torch.device("cpu"))[1] == []


@pytest.mark.parametrize("name", ["plain", "sink", "dense bias", "prefix at run time", "alibi"])
def test_call_of_a_gpu_gives_the_kernel_what_that_of_the_cpu_does(name: str) -> None:
    problem = problem_of(name)
    runner = flex_runner(plan_of(problem))
    tensors, operands = random_inputs(problem)
    expected = runner(*tensors, operands, problem.param_hints)
    kernel = runner._compiled(_first_variant("cpu"))
    with (
        mock.patch.object(FlexRunner, "_compiled", return_value=kernel),
        mock.patch.object(FlexRunner, "_check"),
        mock.patch.object(runner, "device", "cuda"),
    ):
        assert torch.equal(runner(*tensors, operands, problem.param_hints), expected)


def test_lengths_that_are_no_whole_blocks_are_refused_where_blocks_are_whole() -> None:
    runner = flex_runner(plan_of(problem_of("plain")))
    whole = dataclasses.replace(runner.config, whole=True)
    tensors, _ = random_inputs(problem_of("plain"))
    with mock.patch.object(runner, "config", whole), pytest.raises(ValueError, match="multiples"):
        runner(*tensors, [], [])


def test_kernel_for_a_gpu_is_for_tensors_on_it() -> None:
    runner = flex_runner(plan_of(problem_of("plain")))
    tensors, _ = random_inputs(problem_of("plain"))
    with (
        mock.patch.object(runner, "device", "cuda"),
        pytest.raises(ValueError, match="q is on cpu, the kernel was made for cuda"),
    ):
        runner(*tensors, [], [])


def test_op_on_gpus_runs_no_other_kernel() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("adaattn::attention", "CUDA")
    tensors, _ = random_inputs(problem_of("plain"))
    with pytest.raises(ValueError, match="not a plan for a GPU"):
        ops.attention_on_gpu(*tensors, [], [], "{'kernel': 'strips'}")


@pytest.mark.parametrize(
    ("strides", "copied"),
    [((64, 32, 16, 1), False), ((64, 32, 17, 1), True), ((64, 2, 32, 2), True)],
)
def test_strides_are_what_the_kernel_was_compiled_for(
    strides: tuple[int, ...], copied: bool
) -> None:
    tensor = torch.empty(200).as_strided((2, 2, 2, 16), strides)
    found = with_aligned_strides(tensor)
    assert (found is not tensor) == copied
    assert found.stride(-1) == 1
    assert all(stride % 16 == 0 for stride in found.stride()[:-1])


def test_tensors_beyond_32_bits_are_wide() -> None:
    def at(batch: int) -> list[torch.Tensor]:
        return [torch.empty(batch, 4, 1024, 64, device="meta")] * 3

    assert not is_wide(at(8191))
    assert is_wide(at(8193))
    table = torch.empty(2**31 + 1, device="meta")
    assert is_wide([*at(1), table])
