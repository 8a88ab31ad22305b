"""Samples of several batch sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaattn_compiler import calibrate

WIDTH, HEADS, LENGTH = 32, 2, 128


class OneKeyHead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(WIDTH, WIDTH)
        self.kv = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for t in (self.q(x), *self.kv(x).chunk(2, -1))
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Folded(torch.nn.Module):
    """What its first axis is, nothing tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def samples() -> list[tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(batch, LENGTH, WIDTH),) for batch in (2, 3, 1)]


def test_one_key_head_is_calibrated_on_batches_of_several_sizes() -> None:
    torch.manual_seed(0)
    policy = calibrate(OneKeyHead(), samples(), budget=0.01)
    (site,) = policy.sites
    assert (site.heads, site.kv_heads) == (HEADS, 1)


def test_a_batch_that_nothing_tells_from_heads_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"2 heads.* in one sample and 1 heads.*one batch size"):
        calibrate(Folded(), samples(), budget=0.01)
