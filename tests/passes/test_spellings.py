"""Products, scales, layouts, softmaxes, casts and dropout: every way to write them is one site."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, run
from spelling import (
    SCALE,
    SDPA_ONLY,
    B,
    D,
    E,
    H,
    M,
    N,
    Spelling,
    Spellings,
    check_spelling,
    cross,
    square,
    weighted,
    with_extra,
)
from torch import nn

from adaattn_compiler.passes.lower import Lowered

spelling = Spellings()
GROUP = 2


def has_scale(value: float) -> Any:
    """Whether a spec's scale is this number."""
    return lambda spec: math.isclose(spec.scale, value, rel_tol=1e-6)


# -- products --------------------------------------------------------------------------------------


@spelling(spec=has_scale(1.0))
def at_operator(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


@spelling()
def matmul(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -1), v)


@spelling()
def matmul_method(q, k, v):
    return q.matmul(k.transpose(-2, -1)).softmax(-1).matmul(v)


def _folded(*tensors):
    return (t.reshape(-1, *t.shape[-2:]) for t in tensors)


@spelling()
def bmm(q, k, v):
    q, k, v = _folded(q, k, v)
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, -1), v)


@spelling(spec=has_scale(0.25))
def baddbmm_with_beta_zero(q, k, v):
    q, k, v = _folded(q, k, v)
    nothing = torch.empty(B * H, M, N)
    scores = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v)


@spelling(with_extra(cross, lambda: torch.randn(B * H, 1, N)), spec=has_scale(0.25))
def baddbmm_with_alpha_and_beta(q, k, v, bias):
    q, k, v = _folded(q, k, v)
    return torch.bmm(bias.baddbmm(q, k.mT, beta=0.5, alpha=0.25).softmax(-1), v)


@spelling()
def einsum_bhmn(q, k, v):
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * SCALE
    return torch.einsum("bhmn,bhne->bhme", scores.softmax(-1), v)


def rows_first():
    """q [B,M,H,D], k [B,N,H,D], v [B,N,H,E]."""
    return torch.randn(B, M, H, D), torch.randn(B, N, H, D), torch.randn(B, N, H, E)


@spelling(rows_first)
def einsum_bmhd(q, k, v):
    weights = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", q, k) * SCALE, -1)
    return torch.einsum("bhmn,bnhe->bmhe", weights, v)


@spelling(rows_first)
def einsum_heads_first(q, k, v):
    weights = torch.softmax(torch.einsum("bmhd,bnhd->hbmn", q, k) * SCALE, -1)
    return torch.einsum("hbmn,bnhe->mbhe", weights, v)


@spelling(rows_first)
def einsum_heads_last(q, k, v):
    weights = torch.softmax(torch.einsum("bmhd,bnhd->bmnh", q, k) * SCALE, 2)
    return torch.einsum("bmnh,bnhe->bmhe", weights, v)


@spelling(rows_first)
def einsum_transposed_scores(q, k, v):
    weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", k, q) * SCALE, 2)
    return torch.einsum("bhnm,bnhe->bmhe", weights, v)


@spelling(rows_first)
def einsum_value_transposed(q, k, v):
    weights = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", q, k) * SCALE, -1)
    return torch.einsum("bnhe,bhmn->behm", v, weights)


@spelling()
def transposed_all_along(q, k, v):
    """(K Q^T) normalized over its rows, then V^T P."""
    weights = torch.softmax(k @ q.mT * SCALE, dim=-2)
    return v.mT @ weights


@spelling(lambda: (torch.randn(M, D), torch.randn(N, D), torch.randn(N, E)))
def one_head_mm(q, k, v):
    return torch.mm(torch.softmax(torch.mm(q, k.t()) * SCALE, -1), v)


@spelling(lambda: (torch.randn(M, D), torch.randn(N, D), torch.randn(N, E), torch.randn(N)))
def one_head_addmm(q, k, v, bias):
    return torch.mm(torch.softmax(torch.addmm(bias, q, k.t(), alpha=0.3), -1), v)


@spelling(lambda: (torch.randn(M, D), torch.randn(N, D), torch.randn(N, E)))
def one_head_linear(q, k, v):
    return F.linear(torch.softmax(F.linear(q, k) * SCALE, -1), v.t())


@spelling()
def product_with_kernel_of_ones(q, k, v):
    return torch.einsum("bhmn,bhne->bhme", weighted_probabilities(q, k), v)


def weighted_probabilities(q, k):
    return torch.softmax(torch.einsum("bhmd,bhnd->bhmn", q * SCALE, k), -1)


# -- scales ----------------------------------------------------------------------------------------


@spelling(spec=has_scale(0.3))
def scale_after(q, k, v):
    return weighted(q @ k.mT * 0.3, v)


@spelling(spec=has_scale(0.3))
def scale_before_number_first(q, k, v):
    return weighted(0.3 * (q @ k.mT), v)


@spelling(spec=has_scale(1 / 3))
def scale_by_division(q, k, v):
    return weighted(q @ k.mT / 3, v)


@spelling(spec=has_scale(D**-0.5))
def scale_by_sqrt(q, k, v):
    return weighted(q @ k.mT / math.sqrt(q.size(-1)), v)


@spelling(spec=has_scale(0.3))
def scale_on_q(q, k, v):
    return weighted((q * 0.3) @ k.mT, v)


@spelling(spec=has_scale(0.5))
def scale_on_k(q, k, v):
    return weighted(q @ (k / 2).mT, v)


@spelling(spec=has_scale(0.5))
def scale_on_transposed_k(q, k, v):
    return weighted(q @ (k.mT * 0.5), v)


@spelling(spec=has_scale(D**-0.5))
def scale_split_over_both(q, k, v):
    root = D**-0.25
    return weighted((q * root) @ (k * root).mT, v)


@spelling(spec=has_scale(0.06))
def scale_in_three_places(q, k, v):
    return weighted((q * 0.3) @ (k * 0.4).mT / 2, v)


@spelling(spec=has_scale(0.3))
def scale_is_a_constant_tensor(q, k, v):
    return weighted(q @ k.mT * torch.tensor(0.3), v)


@spelling(spec=has_scale(1 / 3))
def scale_is_a_full_tensor(q, k, v):
    return weighted(q @ k.mT / torch.full([], 3.0), v)


@spelling()
def scale_is_the_root_of_a_tensor(q, k, v):
    return weighted(q @ k.mT / torch.sqrt(torch.tensor(float(D))), v)


@spelling(with_extra(cross, lambda: torch.tensor(0.3)))
def scale_is_an_input(q, k, v, scale):
    return weighted(q @ k.mT * scale, v)


@spelling(with_extra(cross, lambda: torch.tensor(3.0)))
def scale_is_an_input_divisor(q, k, v, scale):
    return weighted(q @ k.mT / scale, v)


@spelling(with_extra(cross, lambda: torch.rand(H, 1, 1) + 0.5))
def scale_for_each_head(q, k, v, scale):
    """A learned temperature, as in Swin v2."""
    return weighted(q @ k.mT * scale, v)


@spelling(with_extra(cross, lambda: torch.rand(B, 1, M, 1) + 0.5))
def scale_for_each_query(q, k, v, scale):
    return weighted(q @ k.mT * scale, v)


@spelling()
class ScaleIsABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.3))

    def forward(self, q, k, v):
        return weighted(q @ k.mT * self.scale, v)


@spelling()
class ScaleIsAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.3]))

    def forward(self, q, k, v):
        return weighted(q @ k.mT * self.scale, v)


@spelling()
class CosineAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.rand(H, 1, 1))

    def forward(self, q, k, v):
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return weighted(scores * torch.clamp(self.logit_scale, max=math.log(100.0)).exp(), v)


def flat():
    """Q, K and V of models: [B, N, H * D], whose heads a view parts."""
    return torch.randn(B, M, H * D), torch.randn(B, N, H * D), torch.randn(B, N, H * E)


def parted(q, k, v, heads=H):
    """With sizes of heads that are numbers, as a model's weights make them."""
    views = ((q, heads, D), (k, H, D), (v, H, E))
    return (t.view(t.shape[0], t.shape[1], *size).transpose(1, 2) for t, *size in views)


@spelling(with_extra(flat, lambda: 0.3), dynamic=True)
def scale_is_a_symbolic_float(q, k, v, scale):
    q, k, v = parted(q, k, v)
    return weighted(q @ k.mT * scale, v)


@spelling(with_extra(flat, lambda: 3.0), dynamic=True)
def scale_is_a_symbolic_divisor(q, k, v, scale):
    q, k, v = parted(q, k, v)
    return weighted(q @ k.mT / scale, v)


@spelling(with_extra(flat, lambda: 0.3), dynamic=True)
def scale_is_a_symbolic_float_on_q(q, k, v, scale):
    q, k, v = parted(q, k, v)
    return weighted((q * scale) @ k.mT, v)


@spelling(flat, dynamic=True)
def scale_from_a_shape_of_dynamic_tensors(q, k, v):
    q, k, v = parted(q, k, v)
    return weighted(q @ k.mT / q.shape[-1] ** 0.5, v)


@spelling(spec=has_scale(0.5))
def scale_is_negative(q, k, v):
    return weighted(-(q @ k.mT) / 2, v)


# -- K transposed ----------------------------------------------------------------------------------


@spelling()
def k_by_transpose(q, k, v):
    return weighted(q @ k.transpose(2, 3) * SCALE, v)


@spelling()
def k_by_swapaxes(q, k, v):
    return weighted(q @ k.swapaxes(-1, -2) * SCALE, v)


@spelling()
def k_by_permute(q, k, v):
    return weighted(q @ k.permute(0, 1, 3, 2) * SCALE, v)


@spelling()
def k_by_contiguous_transpose(q, k, v):
    return weighted(q @ k.transpose(-1, -2).contiguous() * SCALE, v)


@spelling(lambda: (torch.randn(B, H, M, D), torch.randn(B, H, D, N), torch.randn(B, H, N, E)))
def k_given_transposed(q, k, v):
    return weighted(q @ k * SCALE, v)


@spelling(lambda: (torch.randn(B, M, H * D), torch.randn(B, N, H * D), torch.randn(B, N, H * E)))
def k_by_view_and_permute(q, k, v):
    q = q.view(B, M, H, D).transpose(1, 2)
    k = k.view(B, N, H, D).permute(0, 2, 3, 1)
    v = v.view(B, N, H, E).transpose(1, 2)
    return weighted(q @ k * SCALE, v).transpose(1, 2).reshape(B, M, H * E)


@spelling(lambda: (torch.randn(B, M, H * D), torch.randn(B, N, H * D), torch.randn(B, N, H * E)))
def folded_batch_and_heads(q, k, v):
    """As in OPT and Bart: [B*H, M, D]."""

    def shape(t, width):
        t = t.view(B, -1, H, width).transpose(1, 2).contiguous()
        return t.view(B * H, -1, width)

    scores = torch.bmm(shape(q * SCALE, D), shape(k, D).transpose(1, 2))
    out = torch.bmm(F.softmax(scores, dim=-1), shape(v, E))
    return out.view(B, H, M, E).transpose(1, 2).reshape(B, M, H * E)


@spelling(lambda: (torch.randn(N, B, 3 * H * D),))
def packed_sequence_first(qkv):
    """As in fairseq and nn.MultiheadAttention: sequence first, Q, K and V in one tensor."""
    q, k, v = qkv.chunk(3, dim=-1)
    q, k, v = (t.contiguous().view(N, B * H, D).transpose(0, 1) for t in (q, k, v))
    out = torch.bmm(torch.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), -1), v)
    return out.transpose(0, 1).contiguous().view(N, B, H * D)


@spelling(lambda: (torch.randn(B, N, 3 * H * D),))
def packed_and_unbound(qkv):
    """As in timm: [3, B, H, N, D] unbound."""
    q, k, v = qkv.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return weighted((q * SCALE) @ k.transpose(-2, -1), v).transpose(1, 2).reshape(B, N, H * D)


@spelling(lambda: (torch.randn(B, N, H * 3 * D),))
def packed_inside_heads(qkv):
    """As in GPT-NeoX: Q, K and V of a head beside each other."""
    q, k, v = qkv.view(B, N, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return weighted(q @ k.mT * SCALE, v)


@spelling(lambda: (torch.randn(B, N, H, 2 * D), torch.randn(B, N, H, D)))
def shared_k_and_v(q, kv):
    """Multi-head latent attention, absorbed: V is a part of K."""
    q, kv = q[..., :D].transpose(1, 2), kv.transpose(1, 2)
    return weighted(q @ kv.mT * SCALE, kv[..., :E])


@spelling(
    lambda: (torch.randn(B, 2, H, M, D), torch.randn(B, 2, H, N, D), torch.randn(B, 2, H, N, E))
)
def five_dimensions(q, k, v):
    return weighted(q @ k.mT * SCALE, v)


@spelling(lambda: (torch.randn(B, M, D), torch.randn(B, N, D), torch.randn(B, N, E)))
def three_dimensions(q, k, v):
    return weighted(q @ k.mT * SCALE, v)


@spelling(lambda: (torch.randn(B, H, 1, D), torch.randn(B, H, N, D), torch.randn(B, H, N, E)))
def one_query(q, k, v):
    return weighted(q @ k.mT * SCALE, v)


@spelling(
    lambda: (torch.randn(B, H, 1, D), torch.randn(B, H, N, D), torch.randn(B, H, N, E)), mask=None
)
def one_query_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@spelling(lambda: (torch.randn(1, H, M, D), torch.randn(B, H, N, D), torch.randn(B, H, N, E)))
def queries_shared_by_the_batch(q, k, v):
    """Learned queries, as in Perceiver."""
    return weighted(q @ k.mT * SCALE, v)


@spelling(lambda: (torch.randn(B, 2 * 9, H * D),))
def windows_of_tokens(x):
    """Attention inside windows of nine, as views of a longer sequence."""
    t = x.view(B, 2, 9, H, D).permute(0, 1, 3, 2, 4).reshape(B * 2, H, 9, D)
    out = weighted(t @ t.mT * SCALE, t)
    return out.view(B, 2, H, 9, D).permute(0, 1, 3, 2, 4).reshape(B, 18, H * D)


@spelling(lambda: (torch.randn(B, 4, 5, 3 * D), torch.randn(B, D, 20)))
def queries_of_an_image(x, kv):
    """A spatial query grid, flattened for the product and given its shape back."""
    q = x[..., :D].reshape(B, 20, D)
    return torch.bmm(torch.softmax(torch.bmm(q, kv) * SCALE, -1), kv.mT).view(B, 4, 5, D)


@spelling(lambda: (torch.randn(B, M, D), torch.randn(B, N, D), torch.randn(B, M, N, D)))
def values_for_each_query(q, k, v):
    """An attention of one query each."""
    weights = torch.softmax(q @ k.mT * SCALE, -1)
    return torch.einsum("bmn,bmne->bme", weights, v)


# -- grouped K and V -------------------------------------------------------------------------------


def grouped():
    """q of H * GROUP heads, k and v of H."""
    return torch.randn(B, H * GROUP, M, D), torch.randn(B, H, N, D), torch.randn(B, H, N, E)


def is_grouped(spec):
    return spec.group == GROUP


@spelling(grouped, spec=is_grouped)
def repeat_interleave(q, k, v):
    k, v = (t.repeat_interleave(GROUP, dim=1) for t in (k, v))
    return weighted(q @ k.mT * SCALE, v)


@spelling(grouped)
def repeated_in_turns(q, k, v):
    """Head h reads head h % G: not groups of neighbours, so no grouped attention."""
    k, v = (t.repeat(1, GROUP, 1, 1) for t in (k, v))
    return weighted(q @ k.mT * SCALE, v)


@spelling(
    lambda: (torch.randn(B, H, M, D), torch.randn(1, 1, N, D), torch.randn(1, H, N, E)),
)
def repeated_over_batch_and_heads(q, k, v):
    k, v = k.repeat(B, H, 1, 1), v.repeat(B, 1, 1, 1)
    return weighted(q @ k.mT * SCALE, v)


@spelling(with_extra(cross, lambda: torch.rand(N) > 0.3), mask="key padding")
def repeated_mask(q, k, v, keep):
    mask = keep.repeat(B, H, M, 1)
    return weighted((q @ k.mT * SCALE).masked_fill(~mask, -1e30), v)


@spelling(grouped, spec=is_grouped)
def repeat_kv(q, k, v):
    """As in transformers."""

    def repeated(t):
        b, g, n, d = t.shape
        return t[:, :, None, :, :].expand(b, g, GROUP, n, d).reshape(b, g * GROUP, n, d)

    return weighted(q @ repeated(k).transpose(2, 3) * SCALE, repeated(v))


@spelling(grouped, spec=is_grouped)
def unsqueeze_and_flatten(q, k, v):
    k, v = (t.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2) for t in (k, v))
    return weighted(q @ k.mT * SCALE, v)


@spelling(grouped)
def stack_and_flatten(q, k, v):
    k, v = (torch.stack([t] * GROUP, dim=2).flatten(1, 2) for t in (k, v))
    return weighted(q @ k.mT * SCALE, v)


@spelling(grouped, spec=is_grouped)
def grouped_broadcast(q, k, v):
    """Five dimensions, K and V broadcast over the group."""
    q = q.view(B, H, GROUP, M, D)
    return weighted(q @ k.unsqueeze(2).mT * SCALE, v.unsqueeze(2)).flatten(1, 2)


@spelling(grouped, spec=is_grouped)
def grouped_einsum(q, k, v):
    q = q.view(B, H, GROUP, M, D)
    weights = torch.einsum("bgrmd,bgnd->bgrmn", q * SCALE, k).softmax(-1)
    return torch.einsum("bgrmn,bgne->bgrme", weights, v).reshape(B, H * GROUP, M, E)


@spelling(grouped, spec=is_grouped)
def grouped_rows(q, k, v):
    """The queries of a group beside each other in one long dimension."""
    q = q.reshape(B, H, GROUP * M, D)
    return weighted(q @ k.mT * SCALE, v).reshape(B, H * GROUP, M, E)


@spelling(grouped, spec=is_grouped)
def enable_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@spelling(grouped, spec=is_grouped)
def sdpa_of_repeated(q, k, v):
    k, v = (t.repeat_interleave(GROUP, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


@spelling(lambda: (torch.randn(B, H, M, D), torch.randn(B, 1, N, D), torch.randn(B, 1, N, E)))
def one_kv_head(q, k, v):
    return weighted(q @ k.mT * SCALE, v)


@spelling(
    lambda: (torch.randn(B, M, H * GROUP * D), torch.randn(B, N, H * D), torch.randn(B, N, H * E)),
    dynamic=True,
    spec=is_grouped,
)
def repeat_kv_dynamic(q, k, v):
    def repeated(t):
        b, g, n, d = t.shape
        return t[:, :, None].expand(b, g, GROUP, n, d).reshape(b, g * GROUP, n, d)

    q, k, v = parted(q, k, v, H * GROUP)
    return weighted(q @ repeated(k).mT * SCALE, repeated(v))


# -- softmax ---------------------------------------------------------------------------------------


@spelling()
def softmax_functional(q, k, v):
    return F.softmax(q @ k.mT * SCALE, dim=-1) @ v


@spelling()
def softmax_method(q, k, v):
    return (q @ k.mT * SCALE).softmax(3) @ v


@spelling()
class SoftmaxModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q, k, v):
        return self.softmax(q @ k.mT * SCALE) @ v


@spelling(lambda: cross(torch.bfloat16))
def softmax_in_float32(q, k, v):
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(lambda: cross(torch.bfloat16))
def scores_cast_to_float32(q, k, v):
    scores = (q @ k.mT).float() * SCALE
    return torch.softmax(scores, -1).type_as(q) @ v


@spelling(lambda: cross(torch.bfloat16))
def operands_cast_to_float32(q, k, v):
    scores = q.float() @ k.float().mT * SCALE
    return torch.softmax(scores, -1).to(v.dtype) @ v


@spelling(lambda: cross(torch.bfloat16))
def all_in_float32(q, k, v):
    return weighted(q.float() @ k.float().mT * SCALE, v.float()).to(q.dtype)


@spelling()
def exp_over_sum(q, k, v):
    e = torch.exp(q @ k.mT * SCALE)
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling()
def exp_over_sum_with_amax(q, k, v):
    s = q @ k.mT * SCALE
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / torch.sum(e, dim=-1, keepdim=True)) @ v


@spelling()
def exp_over_sum_with_max_values(q, k, v):
    s = q @ k.mT * SCALE
    e = (s - s.max(dim=-1, keepdim=True).values).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling()
def exp_over_sum_with_max_item(q, k, v):
    s = q @ k.mT * SCALE
    e = (s - torch.max(s, -1, True)[0].detach()).exp()
    return (e / e.sum(-1, True)) @ v


@spelling()
def exp_over_unsqueezed_sum(q, k, v):
    s = q @ k.mT * SCALE
    e = torch.exp(s - s.amax(-1)[..., None])
    return (e / e.sum(-1).unsqueeze(-1)) @ v


@spelling()
def exp_times_reciprocal(q, k, v):
    e = torch.exp(q @ k.mT * SCALE)
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


@spelling()
def exp_over_sum_with_global_max(q, k, v):
    s = q @ k.mT * SCALE
    e = torch.exp(s - s.max())
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling()
def exp_of_log_sum_exp(q, k, v):
    s = q @ k.mT * SCALE
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


@spelling()
def exp_of_log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT * SCALE, dim=-1).exp() @ v


@spelling()
def softmax_less_maximum(q, k, v):
    s = q @ k.mT * SCALE
    return torch.softmax(s - s.amax(-1, keepdim=True).detach(), -1) @ v


@spelling()
def softmax_less_mean_of_queries(q, k, v):
    """A number of the row, whatever it is, changes no softmax."""
    return weighted(q @ k.mT * SCALE - q.mean(-1, keepdim=True), v)


# -- in place --------------------------------------------------------------------------------------


@spelling(spec=has_scale(0.3))
def scaled_in_place(q, k, v):
    s = q @ k.mT
    s *= 0.3
    return weighted(s, v)


@spelling(spec=has_scale(1 / 3))
def divided_in_place(q, k, v):
    return weighted((q @ k.mT).div_(3), v)


@spelling()
def softmax_in_place(q, k, v):
    """As in detectron and diffusers: exponentials in the scores' own memory."""
    s = (q @ k.mT) * SCALE
    s -= s.amax(-1, keepdim=True)
    s.exp_()
    s /= s.sum(-1, keepdim=True)
    return s @ v


@spelling()
def softmax_written_over_the_scores(q, k, v):
    s = q @ k.mT * SCALE
    s[:] = torch.softmax(s, -1)
    return s @ v


@spelling()
def result_changed_in_place(q, k, v):
    out = weighted(q @ k.mT * SCALE, v)
    out += 1
    return out


@spelling()
def result_written_into_another(q, k, v):
    out = torch.empty(B, H, M, E)
    out[:] = weighted(q @ k.mT * SCALE, v)
    return out


@spelling()
def operand_overwritten_afterwards(q, k, v):
    q = q * 1
    s = q @ k.mT
    q.zero_()
    return weighted(s, v), q


# -- dropout in eval, surroundings -----------------------------------------------------------------


@spelling()
def dropout_not_training(q, k, v):
    return F.dropout(torch.softmax(q @ k.mT * SCALE, -1), 0.5, training=False) @ v


@spelling()
def dropout_of_zero(q, k, v):
    return F.dropout(torch.softmax(q @ k.mT * SCALE, -1), 0.0) @ v


@spelling()
class DropoutInEval(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.eval()

    def forward(self, q, k, v):
        return self.dropout(torch.softmax(q @ k.mT * SCALE, -1)) @ v


@spelling(lambda: (torch.randn(B, N, H * D),))
class WithProjections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(H * D, H * D) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).view(B, N, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        heads = weighted(q @ k.transpose(-1, -2) / math.sqrt(D), v)
        return self.out(heads.transpose(1, 2).flatten(2))


@spelling(sites=2)
def two_sites_that_share_k_and_v(q, k, v):
    k = k * 1.5 + 1
    return weighted(q @ k.mT, v) + weighted((q + 1) @ k.mT, v)


@spelling(square, sites=2)
def one_site_after_another(q, k, v):
    first = weighted(q @ k.mT * SCALE, k)
    return weighted(first @ k.mT * SCALE, v)


@spelling()
def operands_rotated(q, k, v):
    def rotated(x):
        left, right = x.chunk(2, -1)
        turned = torch.cat((-right, left), -1)
        angle = torch.arange(x.shape[-2])[:, None] * torch.arange(1, D + 1)
        return x * angle.cos() + turned * angle.sin()

    return weighted(rotated(q) @ rotated(k).mT * SCALE, v)


@spelling(lambda: (*cross(), torch.randn(B, H, 4, D), torch.randn(B, H, 4, E)))
def keys_from_a_cache(q, k, v, past_k, past_v):
    k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    return weighted(q @ k.mT * SCALE, v)


@spelling(flat, dynamic=True)
def dynamic_shapes(q, k, v):
    q, k, v = parted(q, k, v)
    return weighted(q @ k.mT * SCALE, v).transpose(1, 2).flatten(2)


@spelling(flat, dynamic=True)
def dynamic_einsum(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in parted(q, k, v))
    weights = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", q, k) * SCALE, -1)
    return torch.einsum("bhmn,bnhe->bmhe", weights, v)


@spelling(lambda: cross(torch.float64))
def float64(q, k, v):
    return weighted(q @ k.mT * SCALE, v)


@spelling.parametrized()
def test_spelling_becomes_a_site(spelling: Spelling) -> None:
    check_spelling(spelling)


# -- dropout in training ---------------------------------------------------------------------------

DROP = 0.25


class _Dropped(nn.Module):
    """softmax, dropout, product; `how` names the spelling of dropout."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.dropout = nn.Dropout(DROP)

    def forward(self, q, k, v):
        if self.how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=DROP)
        weights = torch.softmax(q @ k.mT * SCALE, -1)
        if self.how == "module":
            weights = self.dropout(weights)
        elif self.how == "functional":
            weights = F.dropout(weights, DROP)
        elif self.how == "in_place":
            weights = F.dropout(weights, DROP, inplace=True)
        return weights @ v


@pytest.mark.parametrize("how", ["module", "functional", "in_place", "sdpa"])
def test_dropout_in_training_keeps_its_distribution_and_its_backward_the_same_mask(how):
    many = 64
    q, k = torch.randn(8, H, many, D), torch.randn(8, H, many, D)
    v = torch.eye(many).expand(8, H, many, many).contiguous().requires_grad_()
    outcome = run(_Dropped(how), q, k, v, options=SDPA_ONLY, grad=True)
    (lowered,) = outcome.analyses[0].results
    assert isinstance(lowered, Lowered)
    assert lowered.site.spec.dropout_p == DROP
    # V is the identity: the result is the weights themselves, each dropped or scaled up.
    weights = torch.softmax(q @ k.mT * SCALE, -1)
    kept = outcome.result.detach() / weights
    dropped = kept.abs() < 1e-3
    assert torch.allclose(kept[~dropped], torch.tensor(1 / (1 - DROP)), rtol=1e-3)
    deviation = (DROP * (1 - DROP) / dropped.numel()) ** 0.5
    assert abs(dropped.double().mean().item() - DROP) < 6 * deviation
    upward = torch.randn_like(outcome.result)
    outcome.result.backward(upward)
    torch.testing.assert_close(v.grad, outcome.result.detach().mT @ upward)


def test_gradients_are_as_accurate_as_eager():
    def attention(q, k, v):
        keep = torch.ones(N, N, dtype=torch.bool).tril()
        scores = (q @ k.mT * SCALE).masked_fill(~keep, float("-inf"))
        return torch.softmax(scores, -1) @ v

    inputs = [t.requires_grad_() for t in square()]
    outcome = run(attention, *inputs, options=SDPA_ONLY, grad=True)
    assert [site.mask for site in outcome.sites] == ["causal"]
    upward = torch.randn(B, H, N, E)
    ours = torch.autograd.grad(outcome.result, inputs, upward)
    eager = torch.autograd.grad(outcome.eager, inputs, upward)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(attention(*doubles), doubles, upward.double())
    for one, other, wanted in zip(ours, eager, exact, strict=True):
        assert_as_accurate(one, other, wanted)
