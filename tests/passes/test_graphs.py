"""Rewritten graphs: what is in them, and what is no longer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from check import Outcome, run
from spelling import SDPA_ONLY, B, D, E, H, M, N, cross, square
from torch import nn
from torch.testing import FileCheck

SCALE = D**-0.5
GROUP = 2
INF = float("inf")
SDPA = "torch._C._nn.scaled_dot_product_attention"


def rewritten(function, *inputs, grad: bool = False) -> Outcome:
    """The outcome of a function whose one site is lowered."""
    outcome = run(function, *inputs, options=SDPA_ONLY, grad=grad)
    assert [site.lowered for site in outcome.sites] == [True], outcome.sites
    return outcome


def test_causal_masked_fill_becomes_a_flag():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", torch.ones(16, 16).tril().view(1, 1, 16, 16))

        def forward(self, q, k, v):
            s = (q @ k.transpose(-2, -1)) * SCALE
            s = s.masked_fill(self.bias[:, :, :N, :N] == 0, -INF)
            return F.softmax(s, dim=-1) @ v

    graph = rewritten(Causal(), *square()).graph
    (
        FileCheck()
        .check_not("softmax")
        .check_not("matmul")
        .check_not("masked_fill")
        .check(f"call_function[target={SDPA}](args = (%l_q_, %l_k_, %l_v_)")
        .check_same("attn_mask: None")
        .check_same("is_causal: True")
        .check_same(f"scale: {SCALE}")
        .check_next("return (scaled_dot_product_attention,)")
        .run(graph)
    )


def test_repeated_heads_are_not_repeated():
    def attention(q, k, v):
        k, v = (t.repeat_interleave(GROUP, dim=1) for t in (k, v))
        return torch.softmax(q @ k.mT * SCALE, -1) @ v

    q, k, v = cross()
    graph = rewritten(attention, q.repeat(1, GROUP, 1, 1), k, v).graph
    (
        FileCheck()
        .check_not("repeat")
        .check_not("softmax")
        .check(f"{SDPA}](args = (%l_q_, %l_k_, %l_v_)")
        .check_same("enable_gqa: True")
        .run(graph)
    )


def test_einsum_becomes_views_around_one_call():
    def attention(q, k, v):
        weights = torch.einsum("bmhd,bnhd->bhmn", q, k).softmax(-1)
        return torch.einsum("bhmn,bnhe->bmhe", weights, v)

    inputs = (torch.randn(B, M, H, D), torch.randn(B, N, H, D), torch.randn(B, N, H, E))
    graph = rewritten(attention, *inputs).graph
    (
        FileCheck()
        .check_not("einsum")
        .check_not("contiguous")
        .check_count("call_method[target=permute]", 3)
        .check(SDPA)
        .check_same("scale: 1.0")
        .check("call_method[target=permute]")
        .check_not("einsum")
        .run(graph)
    )


def test_ops_in_place_are_gone_with_the_scores():
    def attention(q, k, v):
        s = q @ k.mT
        s *= SCALE
        s.masked_fill_(torch.ones(N, N, dtype=torch.bool).triu(1), -INF)
        return torch.softmax(s, -1) @ v

    graph = rewritten(attention, *square()).graph
    (
        FileCheck()
        .check_not("imul")
        .check_not("masked_fill_")
        .check_not("triu")
        .check(SDPA)
        .check_same("is_causal: True")
        .run(graph)
    )


def test_dropout_is_an_argument():
    def attention(q, k, v):
        return F.dropout(torch.softmax(q @ k.mT * SCALE, -1), 0.25) @ v

    graph = rewritten(attention, *cross(), grad=True).graph
    FileCheck().check_not("functional.dropout").check(SDPA).check_same("dropout_p: 0.25").run(graph)


def test_padding_stays_a_mask_of_keys():
    def attention(q, k, v, keep):
        s = (q @ k.mT * SCALE).masked_fill(~keep[:, None, None, :], -INF)
        return torch.softmax(s, -1) @ v

    keep = torch.arange(N) < torch.tensor([[N], [4]])
    outcome = rewritten(attention, *cross(), keep)
    module = outcome.analyses[0].graph_module
    assert module is not None
    (call,) = (n for n in module.graph.nodes if "scaled_dot" in str(n.target))
    assert call.kwargs["attn_mask"].meta["example_value"].shape == (B, 1, 1, N)
    FileCheck().check_not("softmax").check_not("masked_fill").check(SDPA).run(outcome.graph)


def test_window_is_computed_from_positions():
    def attention(q, k, v):
        row, column = torch.arange(N)[:, None], torch.arange(N)
        keep = (column <= row) & (row - column < 3)
        return torch.softmax((q @ k.mT * SCALE).masked_fill(~keep, -INF), -1) @ v

    outcome = rewritten(attention, *square())
    assert outcome.sites[0].mask == "causal & window(3)"
    (
        FileCheck()
        .check_not("masked_fill")
        .check_not("softmax")
        .check("torch.arange")
        .check(SDPA)
        .run(outcome.graph)
    )


def test_masks_of_two_layers_are_made_once():
    def attention(q, k, v):
        for _ in range(2):
            row, column = torch.arange(N)[:, None], torch.arange(N)
            keep = (row - column).abs() < 3
            q = torch.softmax((q @ k.mT * SCALE).masked_fill(~keep, -INF), -1) @ k
        return q @ v.mT

    outcome = run(attention, *square()[:2], torch.randn(B, H, N, D), options=SDPA_ONLY)
    assert [site.lowered for site in outcome.sites] == [True, True]
    FileCheck().check_count("torch.arange", 2, exactly=True).check_not("softmax").run(outcome.graph)
    FileCheck().check_count(SDPA, 2, exactly=True).run(outcome.graph)
