"""Where a model stops a gradient inside an attention, so do we: the site is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import run

Function = Callable[..., torch.Tensor]
CASES: dict[str, tuple[Function, bool]] = {}


def case(lowered: bool) -> Callable[[Function], Function]:
    """Add a function of q, k, v, and whether it is lowered."""

    def add(function: Function) -> Function:
        CASES[function.__name__] = (function, lowered)
        return function

    return add


@case(lowered=True)
def detached_key(q, k, v):
    return torch.softmax(q @ k.detach().mT / 4, -1) @ v


@case(lowered=True)
def detached_key_with_another_way(q, k, v):
    return torch.softmax(q @ k.detach().mT / 4, -1) @ v + k


@case(lowered=True)
def detached_value(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1) @ v.detach()


@case(lowered=True)
def sdpa_of_detached(q, k, v):
    return F.scaled_dot_product_attention(q, k.detach(), v.detach())


@case(lowered=True)
def detached_bias(q, k, v):
    bias = k.sum(-1)[:, :, None].detach()
    return torch.softmax(q @ k.mT / 4 + bias, -1) @ v


@case(lowered=False)
def detached_weights(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1).detach() @ v


@case(lowered=False)
def detached_scores(q, k, v):
    return torch.softmax((q @ k.mT / 4).detach(), -1) @ v


@case(lowered=False)
def scores_without_grad(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT / 4
    return torch.softmax(scores, -1) @ v


@case(lowered=False)
def weights_without_grad(q, k, v):
    with torch.no_grad():
        weights = torch.softmax(q @ k.mT / 4, -1)
    return weights @ v


@case(lowered=False)
def detached_sum(q, k, v):
    powers = torch.exp(q @ k.mT / 4)
    return (powers / powers.sum(-1, keepdim=True).detach()) @ v


@case(lowered=True)
def detached_maximum(q, k, v):
    """What is subtracted from all scores of a row has no gradient in the end."""
    scores = q @ k.mT / 4
    powers = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return (powers / powers.sum(-1, keepdim=True)) @ v


@case(lowered=True)
def filled_like_the_scores(q, k, v):
    scores = q @ k.mT / 4
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.where(keep, scores, torch.full_like(scores, -torch.inf)).softmax(-1) @ v


@case(lowered=True)
def result_detached(q, k, v):
    return (torch.softmax(q @ k.mT / 4, -1) @ v).detach() + v


@case(lowered=True)
def all_without_grad(q, k, v):
    with torch.no_grad():
        result = torch.softmax(q @ k.mT / 4, -1) @ v
    return result + v


def gradients(result: torch.Tensor, inputs: Any) -> tuple[Any, ...]:
    return torch.autograd.grad(result.sin().sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("name", CASES)
def test_gradients_stop_where_the_model_stops_them(name: str) -> None:
    function, lowered = CASES[name]
    inputs = [torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(3)]
    outcome = run(function, *inputs, grad=True)
    assert [site.lowered for site in outcome.sites] == [lowered], outcome.sites
    torch.testing.assert_close(outcome.result, outcome.eager)
    ours, eager = (gradients(result, inputs) for result in (outcome.result, outcome.eager))
    for mine, theirs in zip(ours, eager, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_without_gradients_a_detach_is_a_view(name: str) -> None:
    function, _ = CASES[name]
    outcome = run(function, *(torch.randn(2, 3, 16, 16) for _ in range(3)))
    if name != "detached_sum":
        assert [site.lowered for site in outcome.sites] == [True], outcome.sites
    torch.testing.assert_close(outcome.result, outcome.eager)


def test_refusal_says_where_a_gradient_stops() -> None:
    inputs = [torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(3)]
    reasons = {
        name: run(CASES[name][0], *inputs, grad=True).sites[0].reason
        for name in ("detached_weights", "scores_without_grad")
    }
    assert "a gradient that stops" in str(reasons["detached_weights"])
    assert "detach or a region without grad (at " in str(reasons["scores_without_grad"])
