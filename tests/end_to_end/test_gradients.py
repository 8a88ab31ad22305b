"""Training: gradients as accurate as eager's, dropout's own distribution, autocast, grad modes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compiled_without_inductor, in_float64
from families import llama, t5, tokens

from adaattn_compiler.explain import records
from adaattn_compiler.options import Options
from adaattn_compiler.passes.pipeline import Analysis

BATCH, HEADS, LENGTH, DIM = 2, 4, 24, 8
WIDTH = HEADS * DIM


class Attention(torch.nn.Module):
    """Projections around one spelling of attention."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q = torch.nn.Linear(WIDTH, WIDTH)
        self.k = torch.nn.Linear(WIDTH, kv_heads * DIM)
        self.v = torch.nn.Linear(WIDTH, kv_heads * DIM)
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, DIM).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, DIM).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, DIM).transpose(1, 2)
        attended: torch.Tensor = self.attend(q, k, v).transpose(1, 2).reshape(batch, length, WIDTH)
        out: torch.Tensor = self.out(attended)
        return out

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


class CausalByHand(Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        above = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return _scores(q, k).masked_fill(above, float("-inf")).softmax(-1) @ v


class LearnedBias(Attention):
    """A bias for each head, query and key that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(1, HEADS, LENGTH, LENGTH))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (_scores(q, k) + self.bias).softmax(-1) @ v


class LearnedBiasSdpa(LearnedBias):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


class Alibi(Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(q.shape[2])
        slopes = torch.tensor([2.0 ** -(head + 1) for head in range(HEADS)], dtype=q.dtype)
        distance = (place[None, :] - place[:, None]).to(q.dtype)
        scores = _scores(q, k) + slopes[:, None, None] * distance
        return scores.masked_fill(distance > 0, float("-inf")).softmax(-1) @ v


class LearnedSlopes(Attention):
    """ALiBi whose slopes are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.rand(HEADS))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(q.shape[2])
        distance = (place[None, :] - place[:, None]).to(q.dtype)
        return (_scores(q, k) + self.slopes[:, None, None] * distance).softmax(-1) @ v


class BiasTable(Attention):
    """A table over clipped distances, as in T5 and Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(17, HEADS)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(q.shape[2])
        distance = (place[None, :] - place[:, None]).clamp(-8, 8) + 8
        bias = self.table(distance).permute(2, 0, 1)[None]
        return (_scores(q, k) + bias).softmax(-1) @ v


class Grouped(Attention):
    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(HEADS // self.kv_heads, dim=1) for x in (k, v))
        return _scores(q, k).softmax(-1) @ v


class GroupedSdpa(Grouped):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class LearnedScale(Attention):
    """A temperature for each head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (_scores(q, k) * self.temperature).softmax(-1) @ v


class Sdpa(Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Dropout(Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout(_scores(q, k).softmax(-1), 0.25, self.training) @ v


SPELLINGS = (
    CausalByHand,
    LearnedBias,
    LearnedBiasSdpa,
    Alibi,
    LearnedSlopes,
    BiasTable,
    Grouped,
    GroupedSdpa,
    LearnedScale,
    Sdpa,
)


def _compiled(function: Callable[..., Any], seen: list[Analysis]) -> Callable[..., Any]:
    return compiled_without_inductor(function, Options(), seen)


def _assert_all_lowered(seen: list[Analysis]) -> None:
    sites = [site for analysis in seen for site in records(analysis)]
    assert sites
    assert [site.reason for site in sites] == [None] * len(sites)


def _gradients(
    module: torch.nn.Module, call: Callable[..., Any], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The result of a call, and the gradients of its input and of all parameters."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    result = call(x)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    (result * weights).sum().backward()
    assert x.grad is not None
    found = {"result": result.detach(), "input": x.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_gradients_are_as_accurate_as_eager(spelling: type[Attention]) -> None:
    module, x = spelling(), torch.randn(BATCH, LENGTH, WIDTH)
    exact_module = in_float64(module)
    exact = _gradients(exact_module, exact_module, x.double())
    eager = _gradients(module, module, x)
    seen: list[Analysis] = []
    ours = _gradients(module, _compiled(module, seen), x)
    _assert_all_lowered(seen)
    for name, value in eager.items():
        assert_as_accurate(ours[name], value, exact[name])


def test_gradient_of_t5_bias_table_is_as_accurate_as_eager() -> None:
    model = t5("eager").eval()  # without dropout
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(16), "use_cache": False}

    def gradient(model: torch.nn.Module, call: Callable[..., Any]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = call(**inputs).logits
        logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    exact_model = in_float64(model)
    exact = gradient(exact_model, exact_model)
    eager = gradient(model, model)
    seen: list[Analysis] = []
    ours = gradient(model, _compiled(model, seen))
    _assert_all_lowered(seen)
    assert ours.keys() == eager.keys()
    assert any("relative_attention_bias" in name for name in ours)
    for name, value in eager.items():
        assert_as_accurate(ours[name], value, exact[name])


# -- dropout ---------------------------------------------------------------------------------------


def _dropped_weights(values: torch.Tensor) -> torch.Tensor:
    """With V the identity and equal scores, the result is the dropped-out weights themselves."""
    return values * values.shape[-1]


def _dropout_on_identity(
    p: float, sdpa: bool
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout(_scores(q, k).softmax(-1), p, True) @ v

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)

    return fused if sdpa else by_hand


@pytest.mark.parametrize("sdpa", [False, True], ids=["by-hand", "sdpa"])
def test_dropout_keeps_its_distribution(sdpa: bool) -> None:
    p, size = 0.25, 64
    q, k = torch.zeros(2, 8, size, 16), torch.zeros(2, 8, size, 16)
    v = torch.eye(size).expand(2, 8, size, size)
    seen: list[Analysis] = []
    attention = _compiled(_dropout_on_identity(p, sdpa), seen)
    weights = _dropped_weights(attention(q, k, v))
    _assert_all_lowered(seen)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (1 - p)))
    count = kept.numel()
    deviation = (kept.double().mean() - (1 - p)).abs() / math.sqrt(p * (1 - p) / count)
    assert deviation < 5  # standard errors of a binomial
    assert not torch.equal(attention(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("sdpa", [False, True], ids=["by-hand", "sdpa"])
def test_dropout_uses_the_same_mask_in_backward(sdpa: bool) -> None:
    size = 32
    q, k = torch.zeros(1, 2, size, 16), torch.zeros(1, 2, size, 16)
    v = torch.eye(size).expand(1, 2, size, size).clone().requires_grad_()
    seen: list[Analysis] = []
    attention = _compiled(_dropout_on_identity(0.5, sdpa), seen)
    out = attention(q, k, v)
    _assert_all_lowered(seen)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, v, upstream)
    # out = W V with V the identity, so the gradient of V is W^T times what flows in.
    torch.testing.assert_close(gradient, out.detach().transpose(-1, -2) @ upstream)


@pytest.mark.parametrize("sdpa", [False, True], ids=["by-hand", "sdpa"])
def test_dropout_gradients_agree_with_differences(sdpa: bool) -> None:
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    attention = _compiled(_dropout_on_identity(0.3, sdpa), [])

    def seeded(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        result: torch.Tensor = attention(*tensors)
        return result

    assert torch.autograd.gradcheck(seeded, (q, k, v))


def test_dropout_is_deterministic_under_a_seed() -> None:
    module, x = Dropout(), torch.randn(BATCH, LENGTH, WIDTH)
    compiled = _compiled(module, [])
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(compiled(x))
    assert torch.equal(*results)


def test_dropout_is_absent_in_eval() -> None:
    module, x = Dropout().eval(), torch.randn(BATCH, LENGTH, WIDTH)
    seen: list[Analysis] = []
    torch.testing.assert_close(_compiled(module, seen)(x), module(x))
    _assert_all_lowered(seen)


# -- autocast --------------------------------------------------------------------------------------


class AutocastInside(Grouped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("spelling", [CausalByHand, BiasTable, Grouped, GroupedSdpa, Sdpa])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_autocast_around_a_compiled_module(spelling: type[Attention], training: bool) -> None:
    module, x = spelling(), torch.randn(BATCH, LENGTH, WIDTH)
    exact = in_float64(module)(x.double())
    seen: list[Analysis] = []
    compiled = _compiled(module, seen)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        eager, ours = module(x), compiled(x)
    _assert_all_lowered(seen)
    assert_as_accurate(ours, eager, exact)
    if training:
        ours.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_autocast_inside_a_compiled_module(training: bool) -> None:
    module, x = AutocastInside(), torch.randn(BATCH, LENGTH, WIDTH)
    plain = Grouped()
    plain.load_state_dict(module.state_dict())
    exact = in_float64(plain)(x.double())
    seen: list[Analysis] = []
    with torch.set_grad_enabled(training):
        eager, ours = module(x), _compiled(module, seen)(x)
    _assert_all_lowered(seen)
    assert_as_accurate(ours, eager, exact)


def test_autocast_around_a_model_that_has_run_before() -> None:
    model = llama("eager").eval()
    inputs = {"input_ids": tokens(), "use_cache": False}
    seen: list[Analysis] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager = model(**inputs).logits
        ours = _compiled(model, seen)(**inputs).logits
    torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.05)
    _assert_all_lowered(seen)
    graph = seen[0].graph_module
    assert graph is not None
    # Nothing is computed a second time: four projections and three of the MLP in each layer.
    products = [n for n in graph.graph.nodes if "linear" in str(n.target) or ".mm" in str(n.target)]
    assert len(products) == 15


# -- grad modes ------------------------------------------------------------------------------------


class PartlyWithoutGrad(CausalByHand):
    """Two attentions, the first in a no_grad region."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            context = super().forward(x)
        return super().forward(x + context)


def test_no_grad_region_inside_a_grad_region() -> None:
    module, x = PartlyWithoutGrad(), torch.randn(BATCH, LENGTH, WIDTH)
    exact_module = in_float64(module)
    exact = _gradients(exact_module, exact_module, x.double())
    eager = _gradients(module, module, x)
    seen: list[Analysis] = []
    ours = _gradients(module, _compiled(module, seen), x)
    _assert_all_lowered(seen)
    assert sum(len(analysis.results) for analysis in seen) == 2
    for name, value in eager.items():
        assert_as_accurate(ours[name], value, exact[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("spelling", [CausalByHand, BiasTable, Sdpa])
def test_inference_contexts(context: Callable[[], Any], spelling: type[Attention]) -> None:
    module, x = spelling(), torch.randn(BATCH, LENGTH, WIDTH)
    seen: list[Analysis] = []
    with context():
        ours = _compiled(module, seen)(x)
        eager = module(x)
        assert_as_accurate(ours, eager, in_float64(module)(x.double()))
    _assert_all_lowered(seen)


def test_one_compiled_module_serves_inference_and_training() -> None:
    module, x = CausalByHand(), torch.randn(BATCH, LENGTH, WIDTH)
    compiled = _compiled(module, [])
    with torch.inference_mode():
        before = compiled(x)
    eager = _gradients(module, module, x)
    ours = _gradients(module, compiled, x)
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value)
    torch.testing.assert_close(before, ours["result"])


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_only_one_input_requires_grad(which: int) -> None:
    inputs = [torch.randn(BATCH, HEADS, LENGTH, DIM) for _ in range(3)]
    inputs[which].requires_grad_()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _scores(q, k).softmax(-1) @ v

    seen: list[Analysis] = []
    ours = torch.autograd.grad(_compiled(attention, seen)(*inputs).sum(), inputs[which])[0]
    eager = torch.autograd.grad(attention(*inputs).sum(), inputs[which])[0]
    _assert_all_lowered(seen)
    torch.testing.assert_close(ours, eager)


# -- with Inductor ---------------------------------------------------------------------------------


def test_training_with_inductor_follows_eager() -> None:
    """Five steps of AdamW: the loss falls, and ends as near float64's as eager's does."""
    module, x = BiasTable(), torch.randn(BATCH, LENGTH, WIDTH)
    goal = torch.randn(BATCH, LENGTH, WIDTH)

    def trained(module: torch.nn.Module, compiled: bool) -> torch.Tensor:
        call = torch.compile(module, backend="adaattn") if compiled else module
        dtype = next(module.parameters()).dtype
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.mse_loss(call(x.to(dtype)), goal.to(dtype))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    exact = trained(in_float64(module), compiled=False)
    eager = trained(copy.deepcopy(module), compiled=False)
    ours = trained(copy.deepcopy(module), compiled=True)
    assert (ours.diff() < 0).all()
    # 16: AdamW divides by the root of squares, which enlarges differences of rounding.
    error, yardstick = ((losses.double() - exact).abs().max() for losses in (ours, eager))
    assert error <= 2 * yardstick + 16 * torch.finfo(torch.float32).eps * exact.abs().max()
