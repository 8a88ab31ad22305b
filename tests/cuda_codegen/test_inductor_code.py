"""What Inductor writes around our kernels: launches of its own, and nothing of ours in between."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_capture import cuda
from inductor_without_gpu import compiled_launches, inductor_code

from adaattn_compiler.options import Options

OURS = Options(kernels=("triton",))


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(cuda(2, 4, 512, 64) for _ in range(3))


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def calls(code: str) -> str:
    """The body of the function that runs the graph."""
    return code.split("    def call(self, args):", 1)[1].split("runner = ", 1)[0]


def test_op_is_gone_and_its_kernel_launched_by_inductor() -> None:
    code = inductor_code(causal, qkv, OURS)
    body = calls(code)
    assert "torch.ops" not in body
    assert len(re.findall(r"fused_qk_softmax_av_0\.run\(", body)) == 1
    assert len(re.findall(r"\.run\(", body)) == 1
    assert "empty_strided_cuda((2, 512, 4, 64)" in body  # the result, and no copy of an input
    assert body.count("empty_strided_cuda") == 1


def test_kernel_is_specialized_as_we_would() -> None:
    code = inductor_code(causal, qkv, OURS)
    assert "'constants': {" in code
    constants = code.split("'constants': {", 1)[1].split("}", 1)[0]
    for constant in ("'HEAD_DIM': 64", "'lse_ptr': None", "'LISTED': False", "'QK': 'ieee'"):
        assert constant in constants
    assert "configs=[{'num_warps': 8, 'num_stages': 3}]" in code
    for name in ("some_keys", "score_of", "LOG2_E"):  # all that the kernel calls goes along
        assert re.search(rf"^(def {name}\(|{name}\b.* = )", code, re.MULTILINE)


def test_what_stands_around_is_fused_as_ever() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.relu(causal(q * 2 + 1, k, v)).sum(-1)

    body = calls(inductor_code(layer, qkv, OURS))
    assert [name for name in re.findall(r"(\w+)\.run\(", body) if "fused_qk" in name]
    assert len(re.findall(r"\.run\(", body)) == 3  # before it, itself, after it


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = 20 * torch.tanh(q @ k.mT * (0.125 / 20))
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v


def with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    scores = q @ k.mT * 0.125
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def few_rows() -> tuple[torch.Tensor, ...]:
    return (cuda(2, 4, 1, 64), *(cuda(2, 4, 4096, 64) for _ in range(2)))


@pytest.mark.parametrize(
    ("function", "make", "kernels"),
    [
        (causal, qkv, ["fused_qk_softmax_av"]),
        (capped, qkv, ["fused_qk_softmax_av"]),
        (with_sinks, lambda: (*qkv(), cuda(4)), ["fused_qk_softmax_av"]),
        (plain, few_rows, ["fused_decode", "combine_splits"]),
    ],
)
def test_text_that_inductor_copies_is_a_kernel(
    function: Callable[..., Any], make: Callable[[], Any], kernels: list[str], tmp_path: Path
) -> None:
    """All that it calls is there, and its arguments are as the text says."""
    found = compiled_launches(inductor_code(function, make, OURS), tmp_path)
    assert list(found) == kernels
    for kernel in found.values():
        assert kernel.shared_memory <= 227 * 1024
        assert kernel.spills == 0
