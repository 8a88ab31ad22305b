"""What is left whole: projections and what lies between them, never a part of an attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import run
from spelling import compare
from torch import fx, nn

from adaattn_compiler.passes.relevance import kept_whole

WIDTH, HEADS, LENGTH = 16, 2, 9


class Block(nn.Module):
    """A transformer's block around an attention that is a function of q, k, v [B,H,N,D]."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = self.attention(*parts).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(x)))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q * 0.3) @ k.mT).softmax(-1) @ v


def rotated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(LENGTH)[:, None] * torch.rand(WIDTH // HEADS)
    q, k = (t * angle.cos() + t.flip(-1) * angle.sin() for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


def by_exponentials(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT
    scores *= 0.3
    return scores.softmax(-1) @ v


def captured(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.Graph:
    graphs: list[fx.Graph] = []

    def backend(graph_module: fx.GraphModule, given: Any) -> Callable[..., Any]:
        graphs.append(graph_module.graph)
        forward: Callable[..., Any] = graph_module.forward
        return forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*inputs)
    return graphs[0]


def names(nodes: Any) -> set[str]:
    return {getattr(node.target, "__name__", str(node.target)) for node in nodes}


def test_projections_norms_and_what_is_between_them_are_left_whole() -> None:
    graph = captured(Block(sdpa), torch.randn(2, LENGTH, WIDTH))
    whole = kept_whole(graph)
    assert {"linear", "layer_norm", "gelu", "add"} <= names(whole)
    looked_into = names(node for node in graph.nodes if node not in whole)
    assert "scaled_dot_product_attention" in looked_into
    assert not looked_into & {"linear", "layer_norm", "gelu", "add"}


@pytest.mark.parametrize("attention", [sdpa, by_hand, rotated, by_exponentials, in_place])
def test_attention_between_whole_calls_is_found(attention: Callable[..., torch.Tensor]) -> None:
    block = Block(attention)
    if attention is rotated:  # its angles are drawn anew at each call
        torch.manual_seed(0)
    inputs = (torch.randn(2, LENGTH, WIDTH),)
    outcome = run(block, *inputs)
    assert [site.lowered for site in outcome.sites] == [True], outcome.sites
    if attention is not rotated:
        compare(block, inputs, outcome)


def test_graph_that_writes_in_place_is_looked_into_throughout() -> None:
    graph = captured(Block(in_place), torch.randn(2, LENGTH, WIDTH))
    assert kept_whole(graph) == frozenset()


def test_number_to_the_power_of_a_tensor_is_an_exponential() -> None:
    graph = captured(lambda x: x**2.0 + 2.0**x, torch.randn(3, 4))
    looked_into = [node for node in graph.nodes if node not in kept_whole(graph)]
    powers = [node for node in looked_into if "pow" in str(node.target)]
    assert [node.args[0] for node in powers] == [2.0]


def test_product_with_an_activation_by_linear_is_no_projection() -> None:
    """F.linear of two inputs is the product of Q and K: looked into, and an attention."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(q, k).softmax(-1), v.t())

    inputs = (torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 6))
    assert "linear" not in names(kept_whole(captured(attention, *inputs)))
    outcome = run(attention, *inputs)
    assert [site.lowered for site in outcome.sites] == [True]
    compare(attention, inputs, outcome)


@pytest.mark.parametrize(
    "between",
    [F.gelu, lambda weights: weights + 1e-3, lambda weights: weights * weights, torch.sigmoid],
)
def test_arithmetic_between_softmax_and_product_is_looked_into(
    between: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Plain as it is: it follows a softmax, so it cannot be left out of sight."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return between((q @ k.mT).softmax(-1)) @ v

    block = Block(attention)
    inputs = (torch.randn(2, LENGTH, WIDTH),)
    outcome = run(block, *inputs)
    assert [site.lowered for site in outcome.sites] == [False]
    assert "between softmax and the product with V" in str(outcome.sites[0].reason)
    compare(block, inputs, outcome)


def test_projection_inside_an_attention_refuses_it() -> None:
    """Heads that are mixed by a linear layer after the softmax are no attention of ours."""
    mix = nn.Linear(HEADS, HEADS)

    class Talking(Block):
        def __init__(self) -> None:
            super().__init__(self.talking)
            self.mix = mix

        def talking(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            weights = (q @ k.mT).softmax(-1)
            return self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v

    inputs = (torch.randn(2, LENGTH, WIDTH),)
    outcome = run(Talking(), *inputs)
    assert not any(site.lowered for site in outcome.sites)


def relu_of_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT / 8
    F.relu(scores, True)
    return scores.softmax(-1) @ v


def relu_of_result(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    result = F.scaled_dot_product_attention(q, k, v)
    F.relu(result, True)
    return result


def silu_of_values_between(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    v = v + 0
    scores = q @ k.mT
    F.silu(v, True)
    return scores.softmax(-1) @ v + v


def relu_of_keys_after_the_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    k = k + 0
    scores = q @ k.mT
    F.relu(k, inplace=True)
    return scores.softmax(-1) @ v + k


@pytest.mark.parametrize(
    "function",
    [relu_of_scores, relu_of_result, silu_of_values_between, relu_of_keys_after_the_scores],
)
def test_activations_in_place_are_seen(function: Callable[..., torch.Tensor]) -> None:
    inputs = tuple(torch.randn(2, 3, LENGTH, 8) for _ in range(3))
    assert kept_whole(captured(function, *inputs)) == frozenset()
    outcome = run(function, *inputs)
    torch.testing.assert_close(outcome.result, outcome.eager)


def test_input_changed_in_place_stays_changed() -> None:
    def function(
        x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        F.relu(x, True)
        return (q @ k.mT).softmax(-1) @ v

    x = -torch.ones(3)
    run(function, x, *(torch.randn(2, 3, LENGTH, 8) for _ in range(3)))
    assert not x.any()


def test_a_product_with_a_tensor_of_symbolic_size_is_analysed() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> Any:
        return F.scaled_dot_product_attention(q * w, k, v)

    q, k, v = torch.randn(3, 2, 4, 96, 16).unbind()
    found = run(attention, q, k, v, torch.randn(96, 1), dynamic=True)
    assert [site.lowered for site in found.sites] == [True]
