"""Layers alike are matched once; what differs in anything the matcher looks at is not alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import run
from spelling import compare
from torch import nn

from adaattn_compiler.passes import match_product, match_sdpa

LENGTH = 12
Layer = Callable[..., torch.Tensor]


def by_hand(scale: float = 0.5, window: int = 0, fill: float = float("-inf")) -> Layer:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        row, column = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        keep = (row >= column) & (row - column < window) if window else row >= column
        return (q @ k.mT * scale).masked_fill(~keep, fill).softmax(-1) @ v

    return attention


def sdpa(**settings: Any) -> Layer:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings)


class Stack(nn.Module):
    """Layers of one width after each other, each with its own projection."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.projections = nn.ModuleList(nn.Linear(8, 24) for _ in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, projection in zip(self.layers, self.projections, strict=True):
            q, k, v = projection(x).view(1, LENGTH, 3, 2, 4).permute(2, 0, 3, 1, 4)
            x = x + layer(q, k, v).transpose(1, 2).reshape(x.shape)
        return x


@pytest.fixture
def matched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was matched in full, in order."""
    seen: list[str] = []
    for module, name in ((match_product, "_manual_site"), (match_sdpa, "_sdpa_site")):
        original = getattr(module, name)

        def noted(*args: Any, original: Any = original, name: str = name) -> Any:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, noted)
    return seen


def check(layers: Sequence[Layer]) -> list[str | None]:
    """Every layer is lowered and right; their masks."""
    stack, inputs = Stack(layers), (torch.randn(1, LENGTH, 8),)
    outcome = run(stack, *inputs)
    assert [site.lowered for site in outcome.sites] == [True] * len(layers)
    compare(stack, inputs, outcome)
    return [site.mask for site in outcome.sites]


@pytest.mark.parametrize("layer", [by_hand(), by_hand(window=3), sdpa(), sdpa(is_causal=True)])
def test_layers_alike_are_matched_once(layer: Layer, matched: list[str]) -> None:
    check([layer] * 4)
    assert len(matched) == 1


def test_names_follow_the_layer() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Stack([sdpa()]) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    outcome = run(Named(), torch.randn(1, LENGTH, 8))
    assert [site.name for site in outcome.sites] == [f"layers.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ([by_hand(), by_hand(window=3), by_hand(), by_hand(window=4)], 3),
        ([by_hand(0.5), by_hand(0.25), by_hand(0.5)], 2),
        ([by_hand(), by_hand(fill=torch.finfo(torch.float32).min), by_hand()], 2),
        ([sdpa(is_causal=True), sdpa(), sdpa(scale=0.1), sdpa()], 3),
        ([sdpa(), by_hand(), sdpa()], 2),
    ],
)
def test_layers_that_differ_are_matched_each(
    layers: list[Layer], kinds: int, matched: list[str]
) -> None:
    check(layers)
    assert len(matched) == kinds


def test_windows_stay_with_their_layers() -> None:
    masks = check([by_hand(window=3), by_hand(), by_hand(window=5), by_hand(window=3)])
    assert masks == ["causal & window(3)", "causal", "causal & window(5)", "causal & window(3)"]


def test_masks_in_buffers_of_their_own_are_read_each(matched: list[str]) -> None:
    """Two buffers of one shape may differ in value, so layers that read them are not alike."""

    class Masked(nn.Module):
        def __init__(self, window: int) -> None:
            super().__init__()
            step = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
            self.register_buffer("keep", (step >= 0) & (step < window))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.mT).masked_fill(~self.keep, float("-inf")).softmax(-1) @ v

    class Two(Stack):
        def __init__(self) -> None:
            masked = nn.ModuleList([Masked(3), Masked(5)])
            super().__init__(list(masked))
            self.masked = masked

    stack, inputs = Two(), (torch.randn(1, LENGTH, 8),)
    outcome = run(stack, *inputs)
    assert [site.mask for site in outcome.sites] == ["causal & window(3)", "causal & window(5)"]
    compare(stack, inputs, outcome)
    assert len(matched) == 2


def test_one_layer_whose_weights_are_returned_is_refused_alone() -> None:
    def returned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        first = (q @ k.mT).softmax(-1)
        second = (k @ q.mT).softmax(-1)
        return first @ v, second @ v, second

    outcome = run(returned, *(torch.randn(1, 2, LENGTH, 4) for _ in range(3)))
    assert [site.lowered for site in outcome.sites] == [True, False]
