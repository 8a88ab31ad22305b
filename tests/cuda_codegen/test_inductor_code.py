"""What Inductor writes around our kernels: launches of its own, and nothing of ours in between."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from cuda_capture import cuda
from inductor_without_gpu import inductor_code

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
