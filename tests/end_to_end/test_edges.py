"""Odd sizes, layouts, types and values: as eager has them, or left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compiled_without_inductor, run
from spelling import SDPA_ONLY

from adaattn_compiler.options import Options
from adaattn_compiler.passes.pipeline import Analysis

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def _kept(q: torch.Tensor, k: torch.Tensor, diagonal: int = 0) -> torch.Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(diagonal)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~_kept(q, k), float("-inf"))
    return scores.softmax(-1) @ v


def _empty_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The first two rows attend to nothing: they are the mean of V."""
    low = torch.finfo(q.dtype).min
    return (q @ k.transpose(-1, -2)).masked_fill(~_kept(q, k, -2), low).softmax(-1) @ v


def _empty_rows_nan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    low = float("-inf")
    return (q @ k.transpose(-1, -2)).masked_fill(~_kept(q, k, -2), low).softmax(-1) @ v


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _nothing_seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


SPELLINGS = (_plain, _causal, _empty_rows, _empty_rows_nan, _sdpa, _nothing_seen)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _expanded() -> list[torch.Tensor]:
    return [_random(2, 1, 9, 8).expand(2, 4, 9, 8), _random(1, 4, 9, 8).expand(2, 4, 9, 8)]


SHAPES: dict[str, Callable[[], list[torch.Tensor]]] = {
    "one-row": lambda: [_random(2, 4, 1, 8), _random(2, 4, 9, 8), _random(2, 4, 9, 8)],
    "one-key": lambda: [_random(2, 4, 9, 8), _random(2, 4, 1, 8), _random(2, 4, 1, 8)],
    "one-dim": lambda: [_random(2, 4, 9, 1) for _ in range(3)],
    "one-head": lambda: [_random(1, 1, 9, 8) for _ in range(3)],
    "empty-batch": lambda: [_random(0, 4, 9, 8) for _ in range(3)],
    "no-rows": lambda: [_random(2, 4, 0, 8), _random(2, 4, 9, 8), _random(2, 4, 9, 8)],
    "other-value-dim": lambda: [_random(2, 4, 9, 8), _random(2, 4, 9, 8), _random(2, 4, 9, 5)],
    "fewer-rows": lambda: [_random(2, 4, 5, 8), _random(2, 4, 9, 8), _random(2, 4, 9, 8)],
    "more-rows": lambda: [_random(2, 4, 9, 8), _random(2, 4, 5, 8), _random(2, 4, 5, 8)],
    "two-axes": lambda: [_random(9, 8) for _ in range(3)],
    "three-axes": lambda: [_random(4, 9, 8) for _ in range(3)],
    "five-axes": lambda: [_random(2, 3, 4, 9, 8) for _ in range(3)],
    "strided": lambda: [
        _random(2, 9, 4, 16).transpose(1, 2)[..., ::2],
        _random(2, 9, 4, 8).transpose(1, 2),
        _random(2, 4, 8, 9).mT,
    ],
    "expanded": lambda: [*_expanded(), _random(1, 1, 9, 8).expand(2, 4, 9, 8)],
    "broadcast": lambda: [_random(2, 4, 9, 8), _random(1, 1, 9, 8), _random(1, 4, 9, 8)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__.strip("_"))
def test_odd_shapes(spelling: Attention, shape: str) -> None:
    tensors = SHAPES[shape]()
    outcome = run(spelling, *tensors)
    exact = spelling(*(tensor.double() for tensor in tensors))
    assert_as_accurate(outcome.result, outcome.eager, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS[:-1], ids=lambda f: f.__name__.strip("_"))
def test_other_precisions(spelling: Attention, dtype: torch.dtype) -> None:
    tensors = [_random(2, 4, 9, 8).to(dtype) for _ in range(3)]
    outcome = run(spelling, *tensors)
    exact = spelling(*(tensor.double() for tensor in tensors))
    assert_as_accurate(outcome.result, outcome.eager, exact)


def test_gradient_of_a_row_filled_by_hand_stays_zero() -> None:
    q, k, v = (_random(2, 4, 9, 8).requires_grad_() for _ in range(3))
    outcome = run(_empty_rows, q, k, v, grad=True)
    ours = torch.autograd.grad(outcome.result.sum() + outcome.result[..., 0].sum(), (q, k, v))
    eager = torch.autograd.grad(outcome.eager.sum() + outcome.eager[..., 0].sum(), (q, k, v))
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_values_that_are_not_finite(
    value: float, place: int, request: pytest.FixtureRequest
) -> None:
    if place == 0 and value != value:
        request.applymarker(
            pytest.mark.xfail(
                reason="torch's SDPA makes a row of NaN zero where keys are few",
                strict=False,
            )
        )
    tensors = [_random(2, 4, 9, 8) for _ in range(3)]
    tensors[place][0, 0, 5, 3] = value
    outcome = run(_plain, *tensors)
    exact = _plain(*(tensor.double() for tensor in tensors))
    assert_as_accurate(outcome.result, outcome.eager, exact)


def test_causal_constant_and_padding_constant_add_up() -> None:
    """Left padding: the first row's only key is padding, so eager spreads it over all keys."""

    def padded(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        scores = q @ k.mT + torch.ones(9, 9).triu(1) * -1e9
        return (scores + (1 - mask[:, None, None, :]) * -1e9).softmax(-1) @ v

    tensors = [_random(2, 4, 9, 8) for _ in range(3)]
    mask = torch.ones(2, 9)
    mask[0, :2] = 0
    outcome = run(padded, *tensors, mask)
    torch.testing.assert_close(outcome.result, outcome.eager)


def _mapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.vmap(_plain)(q, k, v)
    return result


def _differentiated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.func.grad(lambda t: _plain(t, k, v).sum())(q)
    return result


@pytest.mark.parametrize("function", [_mapped, _differentiated])
def test_transforms_around_an_attention_are_left_alone(function: Attention) -> None:
    """Their graphs work on batched or lifted tensors: refused as a whole, and right."""
    tensors = [_random(2, 4, 9, 8) for _ in range(3)]
    seen: list[Analysis] = []
    torch.compiler.reset()
    ours = compiled_without_inductor(function, Options(), seen)(*tensors)
    torch.testing.assert_close(ours, function(*tensors))
    assert [analysis.failure for analysis in seen] == ["a graph inside a transform of torch.func"]
    plain = run(_plain, *tensors)  # and leave nothing behind
    assert plain.sites[0].lowered


def _mutated_value(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    copy = v.clone()
    out = (q @ k.mT).softmax(-1) @ copy
    copy.zero_()
    return out + copy


def _mutated_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    copy = k.clone()
    scores = q @ copy.mT
    copy.zero_()
    return scores.softmax(-1) @ v + copy


def _mask_by_assignment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = _kept(q, k)
    mask[2:, 0] = False
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def _scores_changed_later(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = q @ k.mT
    out = scores.softmax(-1) @ v
    return out + scores.mul_(2).sum()


@pytest.mark.parametrize(
    "function",
    [_mutated_value, _mutated_key, _mask_by_assignment, _scores_changed_later],
    ids=lambda f: f.__name__.strip("_"),
)
def test_changes_in_place_are_heeded(function: Attention) -> None:
    outcome = run(function, *(_random(2, 4, 9, 8) for _ in range(3)))
    torch.testing.assert_close(outcome.result, outcome.eager)


def _asserted_input(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    torch._assert_async((q < 1).all(), "bad q")
    return _plain(q, k, v)


def _asserted_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * 0.3
    torch._assert_async((scores < 1).all(), "bad scores")
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("function", [_asserted_input, _asserted_scores])
def test_assertions_in_the_graph_still_hold(function: Attention) -> None:
    small = [0.1 * torch.rand(2, 4, 9, 8) for _ in range(3)]
    outcome = run(function, *small)
    torch.testing.assert_close(outcome.result, outcome.eager)
    ours = compiled_without_inductor(function, Options(), [])
    with pytest.raises(RuntimeError, match="bad"):
        ours(*(100 * tensor for tensor in small))


def test_results_in_another_order_than_their_softmaxes() -> None:
    """What is shared between sites (a mask) is written before the first that reads it."""

    def crossed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        step = torch.arange(9)[:, None] - torch.arange(9)
        shut = (step < 0) | (step > 3)
        first = (q @ k.mT).masked_fill(shut, float("-inf")).softmax(-1)
        second = (k @ q.mT).masked_fill(shut, float("-inf")).softmax(-1)
        below = second @ v
        return first @ v, below

    outcome = run(crossed, *(_random(2, 4, 9, 8) for _ in range(3)), options=SDPA_ONLY)
    assert [site.lowered for site in outcome.sites] == [True, True]
    torch.testing.assert_close(outcome.result, outcome.eager)


def test_layers_alike_with_dropout_between_their_products() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)
            self.dropout = torch.nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            weights = self.dropout((q @ k.mT / 8).softmax(-1))
            return x + (weights @ v).transpose(1, 2).flatten(2)

    outcome = run(torch.nn.Sequential(Layer(), Layer()).train(), _random(2, 6, 16), grad=True)
    assert [site.lowered for site in outcome.sites] == [True, True]


def test_product_that_adds_to_something_is_refused_with_its_reason() -> None:
    def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(c, (q @ k.mT).softmax(-1), v)

    outcome = run(added, *(_random(2, 9, 8) for _ in range(4)))
    assert [site.lowered for site in outcome.sites] == [False]
    assert "something is added" in str(outcome.sites[0].reason)


@pytest.mark.parametrize("place", ["scores", "weights", "result"])
def test_products_that_are_written_to_a_given_tensor(place: str) -> None:
    def written(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        scores = torch.matmul(q, k.mT, out=out) if place == "scores" else q @ k.mT
        weights = torch.softmax(scores, -1, out=out) if place == "weights" else scores.softmax(-1)
        return torch.matmul(weights, v, out=out) if place == "result" else weights @ v

    tensors = [_random(2, 4, 8, 8) for _ in range(3)]
    buffers = [torch.zeros(2, 4, 8, 8) for _ in range(2)]
    eager = written(*tensors, buffers[0])
    ours = compiled_without_inductor(written, Options(), [])(*tensors, buffers[1])
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(buffers[1], buffers[0])


# -- whole numbers that wrap -----------------------------------------------------------------------

Ids = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Masks of ids of queries and of keys: what wraps in its dtype must not be read as a formula.
WRAPPING: dict[str, tuple[Ids, torch.dtype]] = {
    "difference": (lambda i, j: i - j <= 20, torch.uint8),
    "sum": (lambda i, j: i + j >= 0, torch.int32),
    "product": (lambda i, j: i * j >= 0, torch.int16),
    "negation": (lambda i, j: -i <= j, torch.int8),
    "size": (lambda i, j: i.abs() <= j.abs(), torch.int8),
    "narrowed": (lambda i, j: i.int() == j.int(), torch.int64),
    "other sign": (lambda i, j: i.to(torch.uint8) >= j.to(torch.uint8), torch.int8),
    "compared": (lambda i, j: ~(i < j), torch.int32),
}


@pytest.mark.parametrize("kernel", ["sdpa", "cpp"])
@pytest.mark.parametrize("name", WRAPPING)
def test_whole_numbers_wrap_as_in_eager(name: str, kernel: str) -> None:
    mask, dtype = WRAPPING[name]
    q, k, v = (_random(2, 4, 40, 8) for _ in range(3))
    ends = torch.iinfo(dtype)
    ids = torch.randint(ends.min, ends.max, (2, 40), dtype=dtype)
    if name == "narrowed":
        ids = torch.randint(0, 3, (2, 40)) + torch.randint(0, 2, (2, 40)) * 2**32

    def masked(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        keep = mask(ids[:, None, :, None], ids[:, None, None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    outcome = run(masked, q, k, v, ids, options=Options(kernels=(kernel,)))
    assert outcome.sites[0].lowered
    assert_as_accurate(
        outcome.result, outcome.eager, masked(q.double(), k.double(), v.double(), ids)
    )


def test_whole_numbers_that_cannot_wrap_are_formulas() -> None:
    def masked(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        place = torch.arange(40, dtype=torch.int32)
        keep = (ids[:, None] == ids) & (place[:, None] - place >= 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    ids = torch.randint(0, 3, (40,), dtype=torch.int32)
    outcome = run(masked, *(_random(2, 4, 40, 8) for _ in range(3)), ids)
    assert outcome.sites[0].mask == "causal & segment(0)"


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _grouped_tensors() -> list[torch.Tensor]:
    """As many batch items as key heads: under dynamic=True one symbol stands for both."""
    return [_random(2, 4, 40, 8), *(_random(2, 2, 40, 8) for _ in range(2))]


def test_numbers_of_heads_become_guards() -> None:
    tensors = _grouped_tensors()
    outcome = run(_grouped, *tensors, dynamic=True)
    assert outcome.sites[0].lowered
    exact = _grouped(*(tensor.double() for tensor in tensors))
    assert_as_accurate(outcome.result, outcome.eager, exact)


def test_a_number_of_heads_that_the_user_leaves_open_is_refused_with_that() -> None:
    tensors = _grouped_tensors()
    for tensor in tensors[1:]:
        torch._dynamo.mark_dynamic(tensor, 1)
    (site,) = run(_grouped, *tensors).sites
    assert not site.lowered
    assert "not a fixed number" in str(site.reason)
