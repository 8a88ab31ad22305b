"""What looks like attention and is not, or not only: left alone, and the reason said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import Outcome, run
from spelling import (
    INF,
    SDPA_ONLY,
    B,
    D,
    H,
    M,
    N,
    cross,
    lower_triangle,
    scored,
    square,
    tensors,
    with_extra,
)


@dataclass(frozen=True)
class NearMiss:
    """A function, its inputs and words of the reason for which it is left alone."""

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    reason: str


CASES: list[NearMiss] = []


def near_miss(reason: str, inputs: Callable[[], tuple[Any, ...]] = cross) -> Callable[[Any], Any]:
    """Add a function to the cases."""

    def add(function: Any) -> Any:
        CASES.append(NearMiss(function, inputs, reason))
        return function

    return add


# -- values inside that are used outside -----------------------------------------------------------

BETWEEN = "between softmax and the product with V"
USED = "used outside the attention"


@near_miss(USED)
def weights_returned(q, k, v):
    weights = torch.softmax(scored(q, k), -1)
    return weights @ v, weights


@near_miss(USED)
def weights_averaged(q, k, v):
    weights = torch.softmax(scored(q, k), -1)
    return weights @ v, weights.mean(1)


@near_miss(USED)
def weights_returned_before_dropout(q, k, v):
    weights = torch.softmax(scored(q, k), -1)
    return F.dropout(weights, 0.0) @ v, weights


@near_miss(USED)
def weights_used_for_two_products(q, k, v):
    weights = torch.softmax(scored(q, k), -1)
    return weights @ v, weights @ v.cumsum(-2)


@near_miss(USED, with_extra(cross, lambda: torch.zeros(B, H, M, N)))
def weights_stored_in_an_input(q, k, v, store):
    weights = torch.softmax(scored(q, k), -1)
    store.copy_(weights)
    return weights @ v


@near_miss(USED)
def weights_stored_in_a_local(q, k, v):
    weights = torch.softmax(scored(q, k), -1)
    store = torch.zeros(B, H, M, N + 1)
    store[..., 1:] = weights
    return weights @ v, store


@near_miss(USED)
def exponentials_returned(q, k, v):
    e = scored(q, k).exp()
    weights = e / e.sum(-1, keepdim=True)
    return weights @ v, weights


@near_miss("scores are used outside")
def scores_returned(q, k, v):
    s = scored(q, k)
    return torch.softmax(s, -1) @ v, s


@near_miss("scores are used outside")
def log_sum_exp_returned(q, k, v):
    s = scored(q, k)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


@near_miss("drop")
def dropout_mask_returned(q, k, v):
    noise = torch.zeros(B, H, M, N).bernoulli_(0.75)
    return (torch.softmax(scored(q, k), -1) * (noise / 0.75)) @ v, noise


@near_miss("drop")
def dropout_mask_used_twice(q, k, v):
    noise = torch.zeros(B, H, M, N).bernoulli_(0.75) / 0.75
    return (torch.softmax(scored(q, k), -1) * noise) @ v + noise.sum(-1, keepdim=True)


@near_miss(BETWEEN)
def dropout_mask_shared_by_heads(q, k, v):
    noise = torch.zeros(B, 1, M, N).bernoulli_(0.75) / 0.75
    return (torch.softmax(scored(q, k), -1) * noise) @ v


# -- softmax over something else -------------------------------------------------------------------

AXIS = "does not run over the axis"


@near_miss(AXIS, square)
def softmax_over_queries(q, k, v):
    return torch.softmax(scored(q, k), -2) @ v


@near_miss(AXIS)
def softmax_over_heads(q, k, v):
    return torch.softmax(scored(q, k), 1) @ v


@near_miss(AXIS)
def softmax_over_the_batch(q, k, v):
    return torch.softmax(scored(q, k), 0) @ v


@near_miss(AXIS, square)
def softmax_of_the_transpose(q, k, v):
    return torch.softmax(scored(q, k), -1).mT @ v


@near_miss("keys")
def softmax_over_all_scores_of_a_head(q, k, v):
    return torch.softmax(scored(q, k).flatten(2), -1).view(B, H, M, N) @ v


@near_miss("keys")
def softmax_over_two_more_columns(q, k, v):
    s = torch.cat([scored(q, k), torch.zeros(B, H, M, 2)], -1)
    return torch.softmax(s, -1)[..., :N] @ v


@near_miss("keys")
def softmax_over_a_column_in_front(q, k, v):
    s = torch.cat([torch.zeros(B, H, M, 1), scored(q, k)], -1)
    return torch.softmax(s, -1)[..., 1:] @ v


@near_miss("layout")
def softmax_over_more_keys_than_values(q, k, v):
    return torch.softmax(scored(q, k), -1)[..., : N - 1] @ v[:, :, : N - 1]


@near_miss("sink")
def sink_that_depends_on_scores(q, k, v):
    s = scored(q, k)
    s = torch.cat([s, s[..., :1]], -1)
    return torch.softmax(s, -1)[..., :-1] @ v


@near_miss("maximum")
def sink_beside_scores_less_their_maximum(q, k, v):
    """The maximum is taken from the keys but not from the sink: it matters."""
    s = scored(q, k)
    s = torch.cat([s - s.amax(-1, keepdim=True), torch.zeros(B, H, M, 1)], -1)
    return torch.softmax(s, -1)[..., :-1] @ v


@near_miss("sum")
def exponentials_over_a_sum_of_queries(q, k, v):
    e = scored(q, k).exp()
    return (e / e.sum(-2, keepdim=True)) @ v


@near_miss("sum")
def exponentials_over_a_clamped_sum(q, k, v):
    e = scored(q, k).exp()
    return (e / e.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


@near_miss("sum")
def exponentials_over_a_sum_and_one(q, k, v):
    """softmax off by one: a sink of zero, but not written as one."""
    e = scored(q, k).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@near_miss("sum")
def exponentials_over_the_sum_of_others(q, k, v):
    e = scored(q, k).exp()
    return (e / (scored(q, k) * 2).exp().sum(-1, keepdim=True)) @ v


@near_miss("sum")
def exponentials_over_masked_sum(q, k, v):
    e = scored(q, k).exp()
    return (e / (e * lower_triangle(M, N)).sum(-1, keepdim=True)) @ v


@near_miss("sum")
def exponentials_over_all(q, k, v):
    e = scored(q, k).exp()
    return (e / e.sum()) @ v


@near_miss("sum")
def powers_over_sum(q, k, v):
    e = 2.0 ** scored(q, k)
    return (e / e.sum(-1, keepdim=True)) @ v


# -- between the product and the softmax -----------------------------------------------------------


@near_miss("relu")
def rectified_scores(q, k, v):
    return torch.softmax(torch.relu(scored(q, k)), -1) @ v


@near_miss("sqrt")
def root_of_scores(q, k, v):
    return torch.softmax((scored(q, k) + 10).sqrt(), -1) @ v


@near_miss("log")
def logarithm_of_scores(q, k, v):
    return torch.softmax(torch.log(scored(q, k).exp() + 1), -1) @ v


@near_miss("layer_norm between")
def normalized_scores(q, k, v):
    return torch.softmax(F.layer_norm(scored(q, k), (N,)), -1) @ v


@near_miss("cumsum")
def summed_scores(q, k, v):
    return torch.softmax(scored(q, k).cumsum(-1), -1) @ v


@near_miss("another order", square)
def scores_reversed(q, k, v):
    return torch.softmax(scored(q, k).flip(-1), -1) @ v


@near_miss("dropout")
def scores_dropped(q, k, v):
    return torch.softmax(F.dropout(scored(q, k), 0.5), -1) @ v


@near_miss("depend", with_extra(cross, lambda: torch.rand(N)))
def scale_of_keys(q, k, v, scale):
    return torch.softmax(scored(q, k) * scale, -1) @ v


@near_miss("depend", with_extra(cross, lambda: torch.rand(M, N)))
def scale_of_queries_and_keys(q, k, v, scale):
    return torch.softmax(scored(q, k) * scale, -1) @ v


@near_miss("two factors")
def sum_of_two_scales(q, k, v):
    s = q @ k.mT
    return torch.softmax(torch.where(lower_triangle(M, N), s, 0.5 * s), -1) @ v


@near_miss("scores")
def mask_of_large_scores(q, k, v):
    s = scored(q, k)
    return torch.softmax(s.masked_fill(s < 0, -INF), -1) @ v


@near_miss("scores")
def mask_of_top_scores(q, k, v):
    s = scored(q, k)
    least = s.topk(3, dim=-1).values[..., -1:]
    return torch.softmax(s.masked_fill(s < least, -INF), -1) @ v


@near_miss("scores")
def mask_of_scores_of_other_heads(q, k, v):
    s = scored(q, k)
    return torch.softmax(s + s.mean(1, keepdim=True), -1) @ v


@near_miss("scores")
def scores_of_other_rows_added(q, k, v):
    s = scored(q, k)
    return torch.softmax(s + s.roll(1, -2), -1) @ v


@near_miss("maximum")
def maximum_of_the_row_multiplied(q, k, v):
    s = scored(q, k)
    return torch.softmax(s * s.amax(-1, keepdim=True), -1) @ v


@near_miss("scores")
def maximum_of_the_column_subtracted(q, k, v):
    s = scored(q, k)
    e = torch.exp(s - s.amax(-2, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@near_miss("maximum")
def clamped_below_by_the_maximum(q, k, v):
    s = scored(q, k)
    return torch.softmax(torch.maximum(s, s.amax(-1, keepdim=True) - 1), -1) @ v


# -- between the softmax and the product -----------------------------------------------------------


@near_miss(BETWEEN, with_extra(cross, lambda: torch.rand(B, H, M, N)))
def weights_multiplied(q, k, v, gate):
    return (torch.softmax(scored(q, k), -1) * gate) @ v


@near_miss(BETWEEN)
def weights_squared(q, k, v):
    return torch.softmax(scored(q, k), -1).square() @ v


@near_miss(BETWEEN)
def weights_halved(q, k, v):
    return (torch.softmax(scored(q, k), -1) + 0.5) @ v


@near_miss(BETWEEN)
def weights_normalized_again(q, k, v):
    weights = torch.softmax(scored(q, k), -1) + 1e-3
    return (weights / weights.sum(-1, keepdim=True)) @ v


@near_miss(BETWEEN)
def weights_without_nan(q, k, v):
    return torch.softmax(scored(q, k), -1).nan_to_num() @ v


@near_miss(BETWEEN)
def custom_dropout(q, k, v):
    weights = torch.softmax(scored(q, k), -1)
    kept = (torch.rand(weights.shape) > 0.1).to(weights.dtype)
    return (weights * kept / 0.9) @ v


@near_miss(BETWEEN)
def dropout_scaled_otherwise(q, k, v):
    noise = torch.zeros(B, H, M, N).bernoulli_(0.75)
    return (torch.softmax(scored(q, k), -1) * (noise / 0.4)) @ v


@near_miss("unlike the scores")
def masked_after_the_softmax_only(q, k, v):
    weights = torch.softmax(scored(q, k), -1)
    return weights.masked_fill(~lower_triangle(M, N), 0.0) @ v


@near_miss("unlike the scores")
def masked_otherwise_after_the_softmax(q, k, v):
    s = scored(q, k).masked_fill(torch.arange(N) > 4, -INF)
    return torch.softmax(s, -1).masked_fill(~lower_triangle(M, N), 0.0) @ v


@near_miss(BETWEEN)
def filled_after_the_softmax(q, k, v):
    out = ~lower_triangle(M, N)
    weights = torch.softmax(scored(q, k).masked_fill(out, -INF), -1)
    return weights.masked_fill(out, 0.1) @ v


@near_miss(AXIS)
def heads_mixed(q, k, v):
    """Talking heads."""
    weights = torch.softmax(scored(q, k), -1)
    return torch.einsum("bhmn,hg->bgmn", weights, torch.ones(H, H)) @ v


# -- operands --------------------------------------------------------------------------------------


@near_miss("query", lambda: (torch.randn(B, M, D), torch.randn(B, M, N, D), torch.randn(B, N, D)))
def keys_for_each_query(q, k, v):
    return torch.softmax(torch.einsum("bmd,bmnd->bmn", q, k), -1) @ v


@near_miss("layout")
def keys_by_twos(q, k, v):
    """Half of the keys' scores, each twice."""
    k = k[:, :, :4]
    s = (q @ k.mT).repeat_interleave(2, -1)[..., :N]
    return torch.softmax(s, -1) @ v


@near_miss("overwritten")
def q_overwritten(q, k, v):
    q = q.sin()
    s = q @ k.mT
    q.zero_()
    return torch.softmax(s, -1) @ v, q


@near_miss("overwritten")
def k_overwritten(q, k, v):
    k = k + 0
    s = q @ k.mT
    k.mul_(2)
    return torch.softmax(s, -1) @ v + k[:, :, :M, :1]


@near_miss("overwritten")
def mask_overwritten(q, k, v):
    bias = (q[0, 0] @ k[0, 0].mT).cos()
    s = scored(q, k) + bias
    bias += 1
    return torch.softmax(s, -1) @ v, bias


@near_miss("overwritten")
def v_overwritten_through_a_view(q, k, v):
    v = v * 1
    weights = torch.softmax(scored(q, k), -1)
    v[:, :, 0].zero_()
    return weights @ v


# -- the test --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case.function.__name__ for case in CASES])
def test_near_miss_is_left_alone_with_its_reason(case: NearMiss) -> None:
    outcome = run(case.function, *case.inputs(), options=SDPA_ONLY)
    assert not any(site.lowered for site in outcome.sites)
    reasons = [site.reason for site in outcome.sites]
    assert any(case.reason in (reason or "") for reason in reasons), reasons
    assert not any((reason or "").startswith("no kernel") for reason in reasons)
    for ours, eager in zip(tensors(outcome.result), tensors(outcome.eager), strict=True):
        assert_same(outcome, ours, eager)


def assert_same(outcome: Outcome, ours: torch.Tensor, eager: torch.Tensor) -> None:
    """Equal to the bit, or to rounding where a softmax was kept apart from Inductor's fusion."""
    if outcome.graph == "":
        assert torch.equal(ours, eager)
    else:
        torch.testing.assert_close(ours, eager)


def linear_attention(q, k, v):
    """Softmaxes, but no weights of keys."""
    return torch.softmax(q, -1) @ (torch.softmax(k, -2).mT @ v)


def no_product(q, k, v):
    return torch.softmax((q[..., :1] - k[..., :1].mT).abs(), -1) @ v


def additive_attention(q, k, v):
    """Bahdanau's: a tanh of sums, not a product."""
    s = torch.tanh(q[:, :, :, None] + k[:, :, None]).sum(-1)
    return torch.softmax(s, -1) @ v


def classifier(q, k, v):
    return torch.softmax(q @ k.mT, -1)


@pytest.mark.parametrize("function", [linear_attention, no_product, additive_attention, classifier])
def test_other_softmaxes_are_no_sites(function):
    outcome = run(function, *cross(), options=SDPA_ONLY)
    assert not outcome.sites
    assert_same(outcome, outcome.result, outcome.eager)
