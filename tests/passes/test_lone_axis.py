"""Which outer axis of an attention is the batch and which the heads, where one stands alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import run
from spelling import SDPA_ONLY

from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.passes.pipeline import rewrite

HEADS, HEAD_DIM, LENGTH = 4, 8, 12
WIDTH = HEADS * HEAD_DIM

# Of q, k and v as [B, H or G, length, D].
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Projected(torch.nn.Module):
    """Query heads that share one key head, or more."""

    def __init__(self, attention: Attention, kv_heads: int) -> None:
        super().__init__()
        self.q = torch.nn.Linear(WIDTH, WIDTH)
        self.kv = torch.nn.Linear(WIDTH, 2 * kv_heads * HEAD_DIM)
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for t in (self.q(x), *self.kv(x).chunk(2, -1))
        )
        return self.attention(q, k, v)


def by_flag(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def by_expand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    batch, kv_heads, length, dim = k.shape
    sizes = (batch, kv_heads, HEADS // kv_heads, length, dim)
    k, v = (t[:, :, None].expand(sizes).reshape(batch, HEADS, length, dim) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    return torch.softmax(q @ k.mT * HEAD_DIM**-0.5, -1) @ v


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrmd,bgnd->bgrmn", q, k) * HEAD_DIM**-0.5
    return torch.einsum("bgrmn,bgne->bgrme", scores.softmax(-1), v)


def folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).mul(HEAD_DIM**-0.5).softmax(-1), v)


def sizes(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool | None = None) -> str:
    """B, H and G of the one attention, as captured."""
    analysis = run(function, *inputs, options=SDPA_ONLY, dynamic=dynamic).analyses[0]
    (result,) = analysis.results
    assert isinstance(result, Lowered), result
    found = result.site.sizes
    return " ".join(f"{name}{found[name]}" for name in ("B", "H", "G"))


def x(batch: int, *size: int) -> torch.Tensor:
    return torch.randn(batch, *(size or (LENGTH, WIDTH)))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("attention", [by_flag, by_expand, by_hand, by_einsum, folded])
def test_heads_are_the_same_for_each_batch_size(
    attention: Attention, kv_heads: int, batch: int
) -> None:
    found = sizes(Projected(attention, kv_heads), x(batch))
    assert found == f"B{batch} H{HEADS} G{kv_heads}"


@pytest.mark.parametrize("attention", [by_flag, by_hand, folded])
def test_a_batch_of_any_size_is_no_head(attention: Attention) -> None:
    found = sizes(Projected(attention, 1), x(3), dynamic=True)
    assert found.startswith("Bs")
    assert found.endswith(f"H{HEADS} G1")


def test_one_compilation_serves_batches_of_many_sizes() -> None:
    captured = 0

    def backend(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal captured
        captured += 1
        return (rewrite(graph_module, inputs, SDPA_ONLY).graph_module or graph_module).forward

    torch.compiler.reset()
    compiled = torch.compile(Projected(by_flag, 1), backend=backend)
    with torch.no_grad():
        for batch in (2, 3, 4, 5):
            compiled(x(batch))
    assert captured == 2  # the first, and one for any size


def test_inputs_of_four_dimensions_tell_by_their_order() -> None:
    def one_row(batch: int) -> tuple[torch.Tensor, ...]:
        return x(batch, HEADS, 1, 8), x(batch, 1, LENGTH, 8), x(batch, 1, LENGTH, 8)

    assert sizes(by_flag, x(2, 4, 9, 8), x(2, 1, 9, 8), x(2, 1, 9, 8)) == "B2 H4 G1"
    assert sizes(by_flag, x(1, 4, 9, 8), x(1, 2, 9, 8), x(1, 2, 9, 8)) == "B1 H4 G2"
    assert sizes(by_flag, x(2, 1, 9, 8), x(2, 1, 9, 8), x(2, 1, 9, 8)) == "B2 H1 G1"
    assert sizes(by_hand, *one_row(1)) == "B1 H4 G1"
    assert sizes(by_hand, *one_row(2)) == "B2 H4 G1"


class OneHead(torch.nn.Module):
    """Written without a head axis."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * HEAD_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.mT * HEAD_DIM**-0.5, -1) @ v


def test_what_a_linear_layer_maps_alike_is_a_batch() -> None:
    assert sizes(OneHead(), x(2)) == "B2 H1 G1"
    assert sizes(OneHead(), x(1)) == "B1 H1 G1"


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_multihead_attention_of_any_layout(heads: int, batch_first: bool) -> None:
    module = torch.nn.MultiheadAttention(WIDTH, heads, batch_first=batch_first).eval()

    def attend(tokens: torch.Tensor) -> torch.Tensor:
        return module(tokens, tokens, tokens, need_weights=False)[0]

    inputs = x(2) if batch_first else x(2).transpose(0, 1).contiguous()
    assert sizes(attend, inputs) == f"B2 H{heads} G{heads}"


def test_what_nothing_tells_is_heads() -> None:
    # Near miss: [2, M, D] may be a batch or heads, folded outside of what is seen.
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, *(t.repeat_interleave(2, 0) for t in (k, v)))

    assert sizes(attend, x(2, 9, 8), x(2, 9, 8), x(2, 9, 8)) == "B1 H2 G2"
    assert sizes(shared, x(4, 9, 8), x(2, 9, 8), x(2, 9, 8)) == "B1 H4 G2"
