"""Python floats under `dynamic=True` and Inductor: one compilation, right for every number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, in_float64
from torch import nn
from torch._dynamo.utils import counters

from adaattn_compiler.explain import explain

INF = float("inf")
OURS = ("cpp", "strips", "flex")


class Layer(nn.Module):
    """Causal attention with ALiBi, softcap and a sink, each number a float of the module."""

    def __init__(self, scale: float, cap: float, slope: float, sink: float) -> None:
        super().__init__()
        self.scale, self.cap, self.slope, self.sink = scale, cap, slope, sink

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.tanh(q @ k.mT * self.scale / self.cap) * self.cap
        keys, rows = torch.arange(k.shape[-2]), torch.arange(q.shape[-2])[:, None]
        scores = scores + (keys - rows) * self.slope
        scores = scores.masked_fill(keys > rows, -INF)
        sink = scores.new_zeros(1).add(self.sink).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class Scaled(nn.Module):
    """No more than a scale, in a float of the module."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * self.scale).softmax(-1) @ v


class Capped(Scaled):
    """A scale, and a cap of ten times it."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cap = 10 * self.scale
        scores = torch.tanh(q @ k.mT * self.scale / cap) * cap
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~keep, -INF).softmax(-1) @ v


class Stack(nn.Module):
    """Layers with scales of their own."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            v = layer(q, k, v)
        return v


def inputs(length: int = 40, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(2, 3, length, 16).requires_grad_(grad) for _ in range(3)]


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


def kernels_of(model: Any, tensors: Sequence[torch.Tensor]) -> list[str | None]:
    return [site.kernel for site in explain(model, *tensors, dynamic=True).sites]


@torch.no_grad()
def test_every_number_of_a_layer_may_change_without_compiling_anew() -> None:
    layer = Layer(0.25, 2.5, 0.1, 0.5)
    counters.clear()
    compiled = torch.compile(layer, backend="adaattn", dynamic=True)
    numbers = [(0.25, 2.5, 0.1, 0.5), (0.5, 1.5, 0.3, -1.0), (2.0, 30.0, 0.0, 4.0)]
    for length, (layer.scale, layer.cap, layer.slope, layer.sink) in zip(
        (40, 23, 65), numbers, strict=True
    ):
        tensors = inputs(length)
        exact = layer(*in_float64(tensors))
        assert_as_accurate(compiled(*tensors), layer(*tensors), exact)
    assert compilations() == 1
    (kernel,) = kernels_of(layer, tensors)
    assert kernel in OURS


@torch.no_grad()
def test_layers_keep_their_own_scales() -> None:
    model = Stack([Capped(0.2), Capped(0.9), Scaled(0.4), Scaled(0.05)])
    counters.clear()
    compiled = torch.compile(model, backend="adaattn", dynamic=True)
    for scales in ((0.2, 0.9, 0.4, 0.05), (0.7, 0.1, 0.3, 0.8)):
        for layer, scale in zip(model.layers, scales, strict=True):
            layer.scale = scale
        tensors = inputs()
        assert_as_accurate(compiled(*tensors), model(*tensors), model(*in_float64(tensors)))
    assert compilations() == 1
    kernels = kernels_of(model, tensors)
    assert len(kernels) == 4
    assert set(kernels[:2]) <= set(OURS)
    assert None not in kernels


@torch.no_grad()
def test_number_that_becomes_dynamic_compiles_twice() -> None:
    """Without `dynamic`, the first number is a constant and the second a symbol."""
    model = Capped(0.2)
    counters.clear()
    compiled = torch.compile(model, backend="adaattn")
    tensors = inputs()
    for model.scale in (0.2, 0.5, 0.9, 0.3):
        assert_as_accurate(compiled(*tensors), model(*tensors), model(*in_float64(tensors)))
    assert compilations() == 2


@pytest.mark.parametrize("layer", [Scaled(0.25), Capped(0.25), Layer(0.25, 2.5, 0.1, 0.5)])
def test_gradients_are_as_accurate(layer: Any) -> None:
    compiled = torch.compile(layer, backend="adaattn", dynamic=True, options={"kernels": ["cpp"]})
    counters.clear()
    for layer.scale in (0.25, 0.4):
        tensors = inputs(grad=True)
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        found = [
            gradients(function, given)
            for function, given in ((compiled, tensors), (layer, tensors), (layer, wide))
        ]
        for ours, eager, exact in zip(*found, strict=True):
            assert_as_accurate(ours, eager, exact)
    assert compilations() == 1
    sites = explain(layer, *tensors, dynamic=True, options={"kernels": ["cpp"]}).sites
    assert [site.kernel for site in sites] == ["cpp"]


def gradients(
    function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    out = function(*tensors)
    torch.manual_seed(3)
    return list(torch.autograd.grad(out, tensors, torch.randn(out.shape).to(out.dtype)))


class Call(nn.Module):
    """An SDPA call whose scale or dropout is a float of the module."""

    def __init__(self, **numbers: float) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.numbers)


@torch.no_grad()
def test_scale_of_a_call_is_compiled_for_itself_as_by_inductor() -> None:
    """torch makes a constant of it, under a guard, before we see the graph."""
    counted = []
    for backend in ("inductor", "adaattn"):
        torch.compiler.reset()
        counters.clear()
        model = Call(scale=0.2)
        compiled = torch.compile(model, backend=backend, dynamic=True)
        for model.numbers["scale"] in (0.2, 0.5, 0.9):
            tensors = inputs()
            assert_as_accurate(compiled(*tensors), model(*tensors), model(*in_float64(tensors)))
        counted.append(compilations())
    assert counted[0] == counted[1]


@torch.no_grad()
def test_dropout_of_a_call_is_what_it_is_in_each() -> None:
    model = Call(dropout_p=0.5)
    compiled = torch.compile(model, backend="adaattn", dynamic=True)
    q, k = (torch.zeros(2, 3, 64, 16) for _ in range(2))
    v = torch.ones(2, 3, 64, 16)
    for probability in (0.5, 0.25, 0.0):
        model.numbers["dropout_p"] = probability
        # Weights are alike, so a row is what is kept of its keys, over 1 - p.
        kept = compiled(q, k, v)[..., 0] * (1 - probability)
        assert abs(float(kept.mean()) - (1 - probability)) < 0.05
