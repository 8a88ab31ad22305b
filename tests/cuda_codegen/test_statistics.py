"""Head statistics of CUDA tensors: by the generated kernels, where there is one, as they launch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cuda_capture import cuda, fake_gpu
from specs import SPECS
from torch.fx.experimental.proxy_tensor import make_fx

from adaattn_compiler.kernels.effective_rank import row_products
from adaattn_compiler.kernels.statistics import head_statistics
from adaattn_compiler.spec import AttentionSpec

LAUNCH = "triton_kernel_wrapper_mutation"


def traced(spec: AttentionSpec, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """The calls that head_statistics makes of tensors of B2 H4 M640 N640 D64."""

    def statistics(*tensors: torch.Tensor) -> object:
        q, k, v, *operands = tensors
        return vars(head_statistics(q, k, v, operands, (), spec))

    with fake_gpu(), torch.no_grad():
        qkv = [
            cuda(2, heads, 640, 64, dtype=dtype) for heads in (4, 4 // spec.group, 4 // spec.group)
        ]
        operands = [cuda(4, dtype=torch.float32) for _ in spec.operands]
        graph = make_fx(statistics, tracing_mode="fake")(*qkv, *operands).graph
    return [node for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", ["sink", "alibi", "softcap"])
def test_statistics_on_a_gpu_are_two_launches(name: str) -> None:
    nodes = traced(SPECS[name][0])
    names = [str(node.target) for node in nodes]
    assert names.count(LAUNCH) == 2
    assert not [each for each in names if "_to_copy" in each and "device" in each]
    found = [node.meta.get("val") for node in nodes]
    assert {each.device.type for each in found if isinstance(each, torch.Tensor)} == {"cuda"}


def test_what_has_no_kernel_goes_by_torch_functions() -> None:
    spec = dataclasses.replace(SPECS["causal"][0])
    names = [str(node.target) for node in traced(spec, torch.float64)]
    assert LAUNCH not in names


def test_products_of_rows_are_one_launch() -> None:
    spec = SPECS["gqa"][0]
    with fake_gpu(), torch.no_grad():
        q, k = cuda(2, 4, 640, 64), cuda(2, 2, 640, 64)
        graph = make_fx(lambda q, k: row_products(q, k, spec), tracing_mode="fake")(q, k).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in nodes].count(LAUNCH) == 1
    found = [node.meta.get("val") for node in nodes]
    sizes = [each.numel() for each in found if isinstance(each, torch.Tensor)]
    assert max(sizes) < 2 * 4 * 32 * 640, "the rows of weights are in memory"
