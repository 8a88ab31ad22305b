"""Where a model stops a gradient inside an attention, so do we: the site is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from check import compiled_without_inductor, run

from adaattn_compiler.options import Options

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


# -- views in a region without grad ----------------------------------------------------------------


def key_transposed_without_grad(q, k, v):
    with torch.no_grad():
        turned = k.transpose(-1, -2)
    return (q @ turned * 0.25).softmax(-1) @ v


def value_sliced_without_grad(q, k, v):
    with torch.no_grad():
        part = v[:, :, :, :]
        part = part.reshape(2, 3, 16, 16)
    return F.scaled_dot_product_attention(q, k, part)


def mask_unsqueezed_without_grad(q, k, v):
    with torch.no_grad():
        mask = k[0, 0].unsqueeze(0)
    return F.scaled_dot_product_attention(q, v, v, attn_mask=mask)


def part_of_a_split_without_grad(q, k, v):
    with torch.no_grad():
        first, second = k.chunk(2, -1)
    return (q @ torch.cat([first, second], -1).mT).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        key_transposed_without_grad,
        value_sliced_without_grad,
        mask_unsqueezed_without_grad,
        part_of_a_split_without_grad,
    ],
)
def test_views_without_grad_stop_gradients(function: Function) -> None:
    inputs = [torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(3)]
    outcome = run(function, *inputs, grad=True)
    ours, eager = (gradients(result, inputs) for result in (outcome.result, outcome.eager))
    for mine, theirs in zip(ours, eager, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)


def test_without_grad_throughout_views_are_followed() -> None:
    """Inputs that require grad, in a graph that is all without: nothing stops there."""

    def grouped(q, k, v):
        k, v = (t[:, :, None].expand(2, 3, 2, 16, 16).reshape(2, 6, 16, 16) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    q = torch.randn(2, 6, 16, 16, requires_grad=True)
    k, v = (torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(2))
    outcome = run(grouped, q, k, v)
    assert "G3" in str(outcome.sites[0].shape)


# -- rows that may have no key ---------------------------------------------------------------------

LOW = torch.finfo(torch.float32).min


def padded(fill: float, second: float | None) -> Function:
    """Causal and left padding; the first rows of the first item have no key at all."""

    def attention(q, k, v, keep):
        causal = torch.arange(16)[:, None] >= torch.arange(16)
        scores = q @ k.mT / 4 + torch.where(causal, 0.0, fill)
        if second is None:
            scores = scores.masked_fill(~keep, fill)
        else:
            scores = scores + torch.where(keep, 0.0, second)
        return scores.softmax(-1) @ v

    return attention


@pytest.mark.parametrize(
    ("fill", "second"),
    [
        (LOW, None),
        (LOW, LOW),
        (-1e9, None),
        (-1e9, -1e9),
        (-1e4, -1e4),
        (-torch.inf, LOW),
        (-torch.inf, -torch.inf),
    ],
)
def test_gradients_of_rows_without_a_key_are_the_models(fill: float, second: float | None) -> None:
    keep = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    keep[0, ..., :5] = False
    function = padded(fill, second)
    inputs = [torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(3)]
    outcome = run(function, *inputs, keep, grad=True)
    doubled = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(function(*doubled, keep), doubled)
    ours, eager = (gradients(result, inputs) for result in (outcome.result, outcome.eager))
    for mine, theirs, wanted in zip(ours, eager, exact, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        mine, theirs, wanted = (t.double().nan_to_num() for t in (mine, theirs, wanted))
        assert (mine - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + 1e-5


def test_rows_that_surely_have_a_key_are_lowered_in_training() -> None:
    def causal(q, k, v):
        above = torch.ones(16, 16, dtype=torch.bool).triu(1)
        return (q @ k.mT / 4).masked_fill(above, LOW).softmax(-1) @ v

    inputs = [torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(3)]
    assert run(causal, *inputs, grad=True).sites[0].lowered


# -- hooks -----------------------------------------------------------------------------------------


def test_passes_are_hidden_from_the_users_saved_tensor_hooks() -> None:
    """Checkpointing counts what is saved: what the passes run must not be among it."""
    inputs = [torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(3)]
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    counts = []
    torch.compiler.reset()
    compiled = compiled_without_inductor(detached_key, Options(), [])
    for _ in range(2):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            compiled(*inputs)
        counts.append(len(saved))
    assert counts[0] == counts[1]


def test_first_call_inside_a_checkpoint() -> None:
    inputs = [torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(3)]
    torch.compiler.reset()
    compiled = torch.compile(F.scaled_dot_product_attention, backend="adaattn")
    result = torch.utils.checkpoint.checkpoint(compiled, *inputs, use_reentrant=False)
    eager = F.scaled_dot_product_attention(*inputs)
    for mine, theirs in zip(gradients(result, inputs), gradients(eager, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
