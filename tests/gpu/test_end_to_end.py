"""`torch.compile(model, backend="adaattn")` on the device, against eager and float64 there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, in_float64

import adaattn_compiler

pytestmark = pytest.mark.gpu

Attention = Callable[..., torch.Tensor]
BATCH, HEADS, LENGTH, DIM = 2, 4, 300, 64


def sdpa_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(DIM)).softmax(-1) @ v


def causal_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(DIM)
    return scores.masked_fill(_back(q) < 0, float("-inf")).softmax(-1) @ v


def sliding_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    back = _back(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < 50))


def first_keys_and_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Blocks that no closed form has: they are listed in a table."""
    back, first = _back(q), torch.arange(q.shape[2], device=q.device) < 4
    keep = (back >= 0) & ((back < 50) | first)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = 20.0 * torch.tanh(q @ k.transpose(-1, -2) / math.sqrt(DIM) / 20.0)
    return scores.masked_fill(_back(q) < 0, float("-inf")).softmax(-1) @ v


def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    back = _back(q)
    slopes = torch.exp2(-torch.arange(1, HEADS + 1, device=q.device, dtype=q.dtype))
    scores = q @ k.transpose(-1, -2) / math.sqrt(DIM) - slopes[:, None, None] * back
    return scores.masked_fill(back < 0, float("-inf")).softmax(-1) @ v


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = k[:, ::2], v[:, ::2]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _back(q: torch.Tensor) -> torch.Tensor:
    """How far each key lies behind each query."""
    place = torch.arange(q.shape[2], device=q.device)
    return place[:, None] - place[None, :]


SPELLINGS = (
    *(sdpa_causal, by_hand, causal_by_hand, sliding_window, first_keys_and_window),
    *(softcap, alibi, grouped),
)
# What is lowered in training whichever kernels have a backward: torch's own take it.
LOWERED_IN_TRAINING = (sdpa_causal, by_hand, causal_by_hand, sliding_window, grouped)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_qkv(
    dtype: torch.dtype, length: int = LENGTH, grad: bool = False
) -> tuple[torch.Tensor, ...]:
    """As projections leave them: [B,M,H,D], transposed."""
    size = (BATCH, length, HEADS, DIM)
    data = (torch.randn(size, device="cuda", dtype=dtype) for _ in range(3))
    return tuple(tensor.transpose(1, 2).requires_grad_(grad) for tensor in data)


def assert_accurate(result: torch.Tensor, function: Attention, qkv: tuple[Any, ...]) -> None:
    with torch.no_grad():
        assert_as_accurate(result, function(*qkv), function(*in_float64(qkv)))


def assert_lowered(function: Attention, qkv: tuple[torch.Tensor, ...]) -> None:
    """After what was compiled has run: `explain` may reset Dynamo."""
    explanation = adaattn_compiler.explain(function, *qkv)
    assert len(explanation.sites) == 1, str(explanation)
    assert explanation.sites[0].lowered, str(explanation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", SPELLINGS)
def test_inference_is_as_accurate_as_eager(function: Attention, dtype: torch.dtype) -> None:
    qkv = random_qkv(dtype)
    with torch.no_grad():
        assert_accurate(torch.compile(function, backend="adaattn")(*qkv), function, qkv)
        assert_lowered(function, qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("function", SPELLINGS)
def test_gradients_are_as_accurate_as_eager(function: Attention, dtype: torch.dtype) -> None:
    qkv = random_qkv(dtype, grad=True)
    grad = torch.randn_like(qkv[0])

    def gradients(of: Attention, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(of(*given), given, grad.to(given[0].dtype))

    compiled = torch.compile(function, backend="adaattn")
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in qkv)
    found = (gradients(compiled, qkv), gradients(function, qkv), gradients(function, wide))
    for ours, eager, exact in zip(*found, strict=True):
        assert_as_accurate(ours, eager, exact)
    if function in LOWERED_IN_TRAINING:
        assert_lowered(function, qkv)


class WithMaskInBuffer(torch.nn.Module):
    """As nanoGPT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 1, LENGTH, LENGTH).tril())

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(DIM)
        length = q.shape[2]
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        return scores.softmax(-1) @ v


def test_a_mask_in_a_buffer_is_read() -> None:
    model, qkv = WithMaskInBuffer().cuda(), random_qkv(torch.bfloat16)
    with torch.no_grad():
        assert_accurate(torch.compile(model, backend="adaattn")(*qkv), model, qkv)
        assert_lowered(model, qkv)


@pytest.mark.parametrize("kernel", ["triton", "sdpa", "cudnn", "flash", "efficient", "flex"])
def test_each_kernel_is_right_alone(kernel: str) -> None:
    """Where one cannot be had, Inductor has the site, and that is right, too."""
    qkv = random_qkv(torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(sdpa_causal, backend="adaattn", options={"kernels": kernel})
        assert_accurate(compiled(*qkv), sdpa_causal, qkv)


@pytest.mark.parametrize("function", [sdpa_causal, sliding_window, softcap])
def test_dynamic_lengths_are_right(function: Attention) -> None:
    compiled = torch.compile(function, backend="adaattn", dynamic=True)
    with torch.no_grad():
        for length in (64, 129, 300):
            qkv = random_qkv(torch.bfloat16, length)
            assert_accurate(compiled(*qkv), function, qkv)


@pytest.mark.parametrize("kernels", ["triton", "sdpa,cudnn,flash,efficient,flex,triton"])
@pytest.mark.parametrize("function", [sdpa_causal, sliding_window, first_keys_and_window, softcap])
def test_cuda_graphs_follow_their_inputs(function: Attention, kernels: str) -> None:
    """Recorded with one set of inputs, replayed with others."""
    options = {"kernels": kernels, "triton.cudagraphs": True}
    compiled = torch.compile(function, backend="adaattn", options=options)
    with torch.no_grad():
        for _ in range(5):
            qkv = random_qkv(torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            assert_accurate(compiled(*qkv).clone(), function, qkv)


def test_training_under_cuda_graphs_is_right() -> None:
    compiled = torch.compile(sdpa_causal, backend="adaattn", mode="reduce-overhead")
    for _ in range(4):
        qkv = random_qkv(torch.bfloat16, grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        ours = torch.autograd.grad(compiled(*qkv).sum(), qkv)
        eager = torch.autograd.grad(sdpa_causal(*qkv).sum(), qkv)
        wide = tuple(tensor.detach().double().requires_grad_() for tensor in qkv)
        exact = torch.autograd.grad(sdpa_causal(*wide).sum(), wide)
        for parts in zip((grad.clone() for grad in ours), eager, exact, strict=True):
            assert_as_accurate(*parts)


def test_another_stream_is_followed() -> None:
    """Kernels are launched where the caller's stream is, not on the default one."""
    compiled = torch.compile(softcap, backend="adaattn")
    qkv = random_qkv(torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        compiled(*qkv)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            fresh = tuple(tensor * 0.5 for tensor in qkv)
            result = compiled(*fresh)
        stream.synchronize()
        assert_accurate(result, softcap, fresh)


def test_autocast_is_right() -> None:
    qkv = random_qkv(torch.float32)
    compiled = torch.compile(causal_by_hand, backend="adaattn")
    with torch.no_grad():
        exact = causal_by_hand(*in_float64(qkv))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert_as_accurate(compiled(*qkv), causal_by_hand(*qkv), exact)
