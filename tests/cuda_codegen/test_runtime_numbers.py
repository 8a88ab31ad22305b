"""Python floats under `dynamic=True` on CUDA: operands that no copy brings there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_capture import captured, cuda, fake_gpu
from torch.testing import FileCheck

from adaattn_compiler.options import Options

OURS = Options(kernels=("triton",))


def causal(scores: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~keep, float("-inf"))


def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, number: float) -> torch.Tensor:
    return causal(q @ k.mT * number).softmax(-1) @ v


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, number: float) -> torch.Tensor:
    return causal(torch.tanh(q @ k.mT / number) * number).softmax(-1) @ v


def sloped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, number: float) -> torch.Tensor:
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)
    bias = ((keys - rows) * number).to(q.dtype)
    return causal(q @ k.mT * 0.125 + bias).softmax(-1) @ v


def with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, number: float) -> torch.Tensor:
    scores = causal(q @ k.mT * 0.125)
    sink = scores.new_zeros(1).add(number).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


FUNCTIONS: list[Callable[..., Any]] = [scaled, capped, sloped, with_sink]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_number_becomes_an_operand_of_one_launch(function: Callable[..., Any]) -> None:
    with fake_gpu(), torch.no_grad():
        q, k, v = (cuda(2, 4, 512, 64) for _ in range(3))
        found = captured(function, q, k, v, 0.3, options=OURS, dynamic=True)
    assert [(site.kernel, site.reason) for site in found.sites] == [("triton", None)]
    FileCheck().check_count("adaattn.triton_attention", 1, exactly=True).run(found.rewritten)
    (launch,) = found.launches
    assert "wgmma" in launch.compiled(90).ptx
    (graph,) = found.graphs
    FileCheck().check_not("_local_scalar_dense").check_not("scalar_tensor").run(str(graph.graph))
    casts = graph.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    assert not [cast for cast in casts if "device" in cast.kwargs]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_training_takes_a_number(function: Callable[..., Any]) -> None:
    with fake_gpu():
        q, k, v = (cuda(2, 4, 512, 64, grad=True) for _ in range(3))
        found = captured(function, q, k, v, 0.3, options=OURS, dynamic=True)
    assert [(site.kernel, site.reason) for site in found.sites] == [("triton", None)]
    FileCheck().check("ops.adaattn.triton_attention_training").run(found.rewritten)
