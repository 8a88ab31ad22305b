"""What a model adds to its scores, or does to them: biases, softcaps, sinks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import (
    INF,
    SCALE,
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
    lower_triangle,
    scored,
    square,
    weighted,
    with_extra,
)
from torch import nn

from adaattn_compiler.spec import Load, k, q

spelling = Spellings()


def no_tensor(spec):
    """Whether the spec reads no tensor of queries times keys (a vector by distance has rank 2)."""
    loads = spec.score.atoms(Load)
    return all(len(load.args) == 3 or not (load.has(q) and load.has(k)) for load in loads)


# -- ALiBi -----------------------------------------------------------------------------------------


def slopes():
    return torch.tensor([2.0 ** -(i + 1) for i in range(H)])


@spelling(with_extra(square, slopes), mask="causal", spec=no_tensor)
def alibi_of_distance(q, k, v, slopes):
    place = torch.arange(N)
    bias = slopes[:, None, None] * (place[None, :] - place[:, None])
    s = scored(q, k) + bias
    return weighted(s.masked_fill(~lower_triangle(N, N), -INF), v)


@spelling(with_extra(square, slopes), mask="none", spec=no_tensor)
def alibi_of_absolute_distance(q, k, v, slopes):
    distance = (torch.arange(N)[None, :] - torch.arange(N)[:, None]).abs()
    return weighted(scored(q, k) - slopes.view(H, 1, 1) * distance, v)


@spelling(with_extra(square, slopes), mask="causal", spec=no_tensor)
def alibi_of_keys(q, k, v, slopes):
    """MPT and BLOOM: by the key alone, as a row's constant changes nothing."""
    bias = slopes.view(1, H, 1, 1) * torch.arange(1 - N, 1).view(1, 1, 1, N)
    return weighted((scored(q, k) + bias).masked_fill(~lower_triangle(N, N), -INF), v)


@spelling(with_extra(square, slopes, lambda: torch.ones(B, N, dtype=torch.long)), mask="causal")
def alibi_of_bloom(q, k, v, slopes, attention_mask):
    """Positions counted from the attention mask, added by baddbmm."""
    slopes = 2.0 ** -torch.arange(1.0, H + 1)  # given from outside they might be as low as a mask
    place = (attention_mask.cumsum(dim=-1) - 1) * attention_mask
    alibi = (slopes[..., None] * place[:, None, :]).reshape(B * H, 1, N)
    q, k, v = (t.reshape(B * H, N, -1) for t in (q, k, v))
    s = alibi.baddbmm(q, k.transpose(-1, -2), beta=1.0, alpha=SCALE).view(B, H, N, N)
    causal = torch.triu(torch.full((N, N), torch.finfo(q.dtype).min), 1)
    return torch.bmm(torch.softmax(s + causal, -1).view(B * H, N, N), v)


@spelling(square, mask="causal")
class AlibiOfABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", slopes())
        self.register_buffer("mask", torch.full((N, N), -INF).triu(1))

    def forward(self, q, k, v):
        bias = self.slopes[:, None, None] * torch.arange(N)
        return weighted(scored(q, k) + bias + self.mask, v)


# -- relative positions ----------------------------------------------------------------------------


def t5_bucket(distance, buckets=8, furthest=16):
    """Relative position buckets, bidirectional, as in T5."""
    buckets //= 2
    bucket = (distance > 0).to(torch.long) * buckets
    distance = distance.abs()
    exact = buckets // 2
    large = exact + (
        torch.log(distance.float() / exact) / math.log(furthest / exact) * (buckets - exact)
    ).to(torch.long)
    large = torch.min(large, torch.full_like(large, buckets - 1))
    return bucket + torch.where(distance < exact, distance, large)


@spelling(square, mask="none", spec=no_tensor)
class T5Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, H)

    def forward(self, q, k, v):
        distance = torch.arange(N)[None, :] - torch.arange(N)[:, None]
        bias = self.table(t5_bucket(distance)).permute(2, 0, 1).unsqueeze(0)
        s = q @ k.transpose(3, 2)
        s += bias
        return F.softmax(s.float(), dim=-1).type_as(s) @ v


@spelling(with_extra(square, lambda: torch.ones(B, N)), mask=None)
class T5BiasAndMask(nn.Module):
    """The mask is added to the bias, and both to the scores."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, H)

    def forward(self, q, k, v, keep):
        distance = torch.arange(N)[None, :] - torch.arange(N)[:, None]
        bias = self.table(t5_bucket(distance)).permute(2, 0, 1).unsqueeze(0)
        bias = bias + (1 - keep[:, None, None, :]) * torch.finfo(q.dtype).min
        return weighted(q @ k.mT + bias, v)


@spelling(mask="none", spec=no_tensor)
class ClippedDistances(nn.Module):
    """A learned bias for each clipped distance."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, H))

    def forward(self, q, k, v):
        distance = torch.arange(N)[None, :] - torch.arange(M)[:, None]
        bias = self.table[distance.clamp(-3, 3) + 3].permute(2, 0, 1)
        return weighted(scored(q, k) + bias, v)


WINDOW = 3
TOKENS = WINDOW * WINDOW


def window_distances():
    """Swin's index of relative positions inside a window."""
    place = torch.stack(torch.meshgrid(*[torch.arange(WINDOW)] * 2, indexing="ij")).flatten(1)
    distance = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + WINDOW - 1
    return distance[..., 0] * (2 * WINDOW - 1) + distance[..., 1]


class _Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, H))
        self.register_buffer("index", window_distances())

    def bias(self):
        rows = self.table[self.index.view(-1)].view(TOKENS, TOKENS, -1)
        return rows.permute(2, 0, 1).contiguous().unsqueeze(0)


def windows():
    """Four windows for each of B images."""
    return tuple(torch.randn(B * 4, H, TOKENS, size) for size in (D, D, E))


@spelling(windows, mask="none")
class SwinBias(_Swin):
    def forward(self, q, k, v):
        return weighted(scored(q, k) + self.bias(), v)


@spelling(with_extra(windows, lambda: -100.0 * (torch.rand(4, TOKENS, TOKENS) > 0.5)), mask="none")
class SwinBiasAndShift(_Swin):
    """Shifted windows: a mask for each window, added to scores of five dimensions."""

    def forward(self, q, k, v, mask):
        s = scored(q, k) + self.bias()
        s = s.view(B, 4, H, TOKENS, TOKENS) + mask.unsqueeze(1).unsqueeze(0)
        return weighted(s.view(-1, H, TOKENS, TOKENS), v)


@spelling(
    lambda: (*square(), torch.randn(B, H, 2 * N, D), torch.randn(B, H, 2 * N, D)), mask="none"
)
def deberta(q, k, v, pos_k, pos_q):
    """Content to content, with content to position and position to content gathered."""
    scale = 1 / math.sqrt(D * 3)
    distance = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    c2p = torch.clamp(distance + N, 0, 2 * N - 1).expand(B, H, N, N)
    p2c = torch.clamp(-distance + N, 0, 2 * N - 1).expand(B, H, N, N)
    s = torch.matmul(q, k.transpose(-1, -2) * scale)
    bias = torch.gather(torch.matmul(q, pos_k.mT * scale), -1, c2p)
    bias = bias + torch.gather(torch.matmul(k, pos_q.mT * scale), -1, p2c).transpose(-1, -2)
    return weighted(s + bias, v)


@spelling(lambda: (*square(), torch.randn(B, H, 2 * N - 1, D)), mask="none")
def transformer_xl(q, k, v, positions):
    """Relative shift by padding and views."""
    bd = q @ positions.mT
    bd = F.pad(bd, (1, 0)).view(B, H, 2 * N, N)[:, :, 1:].view(B, H, N, 2 * N - 1)[..., :N]
    return weighted((q @ k.mT + bd) * SCALE, v)


@spelling(with_extra(cross, lambda: torch.randn(H, M, N)), mask="none")
def bias_and_mask(q, k, v, bias):
    keep = lower_triangle(M, N)
    return weighted((scored(q, k) + bias) + torch.where(keep, 0.0, -20.0), v)


@spelling(with_extra(cross, lambda: torch.randn(B, 1, 1, N)), mask="none")
def bias_of_keys(q, k, v, bias):
    return weighted(scored(q, k) + bias, v)


@spelling(with_extra(cross, lambda: torch.randn(B, 1, M, 1)), mask="none")
def bias_of_queries(q, k, v, bias):
    return weighted(scored(q, k) + bias, v)


@spelling(with_extra(cross, lambda: torch.rand(B, 1, M, N) + 0.1), mask="none")
def bias_by_logarithm(q, k, v, weight):
    """Weights multiplied into the probabilities, as logarithms (Graphormer, speech models)."""
    return weighted(scored(q, k) + weight.log(), v)


@spelling(with_extra(cross, lambda: torch.randn(D)), mask="none")
def bias_of_q(q, k, v, bias):
    """(Q + u) K^T, as in Transformer-XL."""
    return weighted((q + bias) @ k.mT * SCALE, v)


@spelling(mask="none")
def row_maximum_before_a_bias(q, k, v):
    s = scored(q, k)
    bias = torch.arange(N) * 0.1
    e = torch.exp(s + bias - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


# -- functions of scores ---------------------------------------------------------------------------


@spelling(mask=None, taken=False)
def softcap(q, k, v):
    return weighted(torch.tanh(scored(q, k) / 5.0) * 5.0, v)


@spelling(mask=None, taken=False)
def softcap_in_steps_in_place(q, k, v):
    s = scored(q, k)
    s /= 5.0
    s.tanh_()
    s *= 5.0
    return weighted(s, v)


@spelling(square, mask=None, taken=False)
def softcap_and_causal_mask(q, k, v):
    s = 5.0 * torch.tanh(scored(q, k) / 5.0)
    return weighted(s + torch.triu(torch.full((N, N), -INF), 1), v)


@spelling(square, mask=None, taken=False)
def softcap_of_masked_scores(q, k, v):
    """The mask is inside the softcap: a key is not shut out, its score is -5."""
    s = scored(q, k).masked_fill(~lower_triangle(N, N), -INF)
    return weighted(5.0 * torch.tanh(s / 5.0), v)


@spelling(lambda: cross(torch.bfloat16), mask=None, taken=False)
def softcap_in_float32(q, k, v):
    s = torch.tanh(scored(q, k).float() / 5.0) * 5.0
    return torch.softmax(s, -1).to(q.dtype) @ v


@spelling(mask=None, taken=False)
def clamped_scores(q, k, v):
    return weighted(scored(q, k).clamp(-1.0, 1.0), v)


@spelling(mask=None, taken=False)
def absolute_scores(q, k, v):
    return weighted(scored(q, k).abs(), v)


@spelling(mask=None, taken=False)
def squared_scores(q, k, v):
    s = scored(q, k)
    return weighted(s * s, v)


# -- sinks -----------------------------------------------------------------------------------------


def sinks():
    return torch.randn(H)


@spelling(with_extra(cross, sinks), mask=None, taken=False)
def sink_concatenated_and_sliced_off(q, k, v, sinks):
    """GPT-OSS."""
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    s = torch.cat([scored(q, k), column], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return F.softmax(s, dim=-1, dtype=s.dtype)[..., :-1] @ v


@spelling(with_extra(square, sinks), mask=None, taken=False)
def sink_beside_a_causal_mask(q, k, v, sinks):
    s = scored(q, k) + torch.triu(torch.full((N, N), -INF), 1)
    s = torch.cat([s, sinks.view(1, H, 1, 1).expand(B, -1, N, -1)], -1)
    return torch.softmax(s, -1)[..., :N] @ v


@spelling(cross, mask=None, taken=False)
def sink_of_zero(q, k, v):
    """One more in the denominator."""
    s = torch.cat([scored(q, k), torch.zeros(B, H, M, 1)], -1)
    return torch.softmax(s, -1)[..., :-1] @ v


@spelling(cross, mask=None, taken=False)
def sink_by_padding(q, k, v):
    return torch.softmax(F.pad(scored(q, k), (0, 1)), -1)[..., :-1] @ v


@spelling(with_extra(cross, sinks), mask=None, taken=False)
def sink_in_exponentials(q, k, v, sinks):
    s = torch.cat([scored(q, k), sinks.view(1, H, 1, 1).expand(B, -1, M, -1)], -1)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True))[..., :N] @ v


@spelling.parametrized()
def test_score_is_understood(spelling: Spelling) -> None:
    check_spelling(spelling)
