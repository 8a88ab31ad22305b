"""A synthetic case of long context: heads with a window and a sink beside diffuse ones.

    python -m benchmarks.long_context [--length 16384] [--samples 2] [--budget 0.01]
                                      [--policy FILE] [--json FILE] [--smoke]

One causal attention of 8 heads, D 64, float32, of tensors that are made up (no model is behind
them), by the form that is found in trained language models (Xiao et al., "Efficient streaming
language models with attention sinks", 2024):

heads 0 to 5  scores fall with distance, by random rotary waves (scores of equal places are `_PEAK`
              above the mean, those of places `width` apart at the mean, width 64 to 512); the first
              key is a sink, which attracts every query by `_SINK`, and whose value is small; noise
              of standard deviation 1 is in all scores
heads 6 and 7 diffuse: scores are noise of standard deviation 1.5

What share of its weight each head has where is measured and printed as `shares`: among the first 64
keys, and among the 1024 keys up to a row's own; of rows in the second half. At 16,384 keys heads 0
to 5 have 27% to 39% among the first and 61% to 73% among the last, together at least 99.9%; heads 6
and 7 have 1% and 9%, as if nearly all keys counted alike.

Waves and widths are the same for all samples, as weights are; what is random in a sequence differs.
Calibrated (adaattn_compiler.calibrate) on some samples, measured on another: the relative error of
each head, and the time of the attention, each in turns with another (attentions.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import adaattn_compiler
from adaattn_compiler.decision import describe_head
from adaattn_compiler.policy import Policy
from benchmarks.attentions import as_decided, compared, errors, sites_of, ways
from benchmarks.machine import describe_machine

HEADS, HEAD_DIM = 8, 64
WIDTHS = (64, 128, 192, 256, 384, 512)  # of heads with a window, in keys
# In natural units of the scores.
_PEAK, _SINK, _NOISE, _DIFFUSE = 18.0, 20.0, 1.0, 1.5
_SINK_VALUE = 0.1  # of the length of other values
# Of the head's dimensions, those that carry positions; one carries the sink, the others noise.
_PLACES, _SINKS = 32, 1

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Attention(torch.nn.Module):
    """Nothing but the attention."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sample(seed: int, length: int) -> Tensors:
    """q, k, v [1, HEADS, length, HEAD_DIM]."""
    random = torch.Generator().manual_seed(1000 + seed)
    waves = torch.Generator().manual_seed(0)
    heads = [_windowed(width, length, waves, random) for width in WIDTHS]
    heads += [_diffuse(length, random) for _ in range(HEADS - len(WIDTHS))]
    q, k = (torch.stack(parts)[None] for parts in zip(*heads, strict=True))
    v = torch.randn(1, HEADS, length, HEAD_DIM, generator=random)
    v[:, : len(WIDTHS), 0] *= _SINK_VALUE
    return q * HEAD_DIM**0.5, k, v  # attention divides by that root


def _windowed(
    width: int, length: int, waves: torch.Generator, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    # Waves of frequencies up to 2 pi / (2 width), at random: their mean at a distance d is
    # sin(x) / x with x = pi d / width, and noise of 1 / sqrt(waves) beyond.
    count = _PLACES // 2
    frequencies = torch.rand(count, generator=waves) * torch.pi / width
    angles = torch.arange(length)[:, None] * frequencies
    places = torch.cat([angles.cos(), angles.sin()], -1) / count**0.5
    rest = HEAD_DIM - _PLACES - _SINKS
    q_noise, k_noise = torch.randn(2, length, rest, generator=random)
    ones, first = torch.ones(length, 1), (torch.arange(length) == 0).float()[:, None]
    q = torch.cat([_PEAK * places, _SINK * ones, _NOISE / rest**0.5 * q_noise], -1)
    return q, torch.cat([places, first, k_noise], -1)


def _diffuse(length: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = torch.randn(2, length, HEAD_DIM, generator=random)
    return _DIFFUSE / HEAD_DIM**0.5 * q, k


def shares(tensors: Tensors, rows: int = 32, first: int = 64, near: int = 1024) -> list[Any]:
    """Of each head the mean share of its weight in the first keys, and in those just up to a row
    (not counted twice); of some rows of the second half."""
    q, k, _ = tensors
    length = q.shape[2]
    at = torch.linspace(length // 2, length - 1, rows).long()
    behind = at[:, None] - torch.arange(length)
    scores = (q[:, :, at] @ k.mT).double() / HEAD_DIM**0.5
    weights = scores.masked_fill(behind < 0, float("-inf")).softmax(-1)[0]
    is_first = torch.arange(length) < first
    return [
        {
            f"first {first}": float(weights[head, :, is_first].sum(-1).mean()),
            f"last {near}": float((weights[head] * ((behind < near) & ~is_first)).sum(-1).mean()),
        }
        for head in range(HEADS)
    ]


def main() -> None:
    asked = _asked()
    torch.manual_seed(0)
    length = 512 if asked.smoke else asked.length
    model, tensors = Attention().eval(), sample(0, length)
    policy, seconds = _policy(asked, model, length)
    calls = ways(sites_of(model, tensors, {}), policy)
    (site,) = policy.sites
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "synthetic": True,
        "length": length,
        "budget": policy.provenance.budget.value,
        "calibration_seconds": seconds,
        "shares": shares(tensors),
        "decisions": [describe_head(head) for head in site.decision.heads],
        "errors": errors(calls)[0],
        "attention": compared(calls, asked.seconds, asked.smoke),
        "as_decided": as_decided(calls)[0],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.json:
        Path(asked.json).write_text(text + "\n")
    if asked.smoke:
        print("smoke: it runs; at this size and with two rounds the figures mean nothing")


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=2, help="to calibrate on")
    parser.add_argument("--budget", type=float, default=0.01, help="relative error of each head")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--policy", help="a policy's file, instead of calibrating")
    parser.add_argument("--save", help="where to write the policy that was calibrated")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each pair of calls")
    parser.add_argument("--json", help="a file for the result")
    parser.add_argument("--smoke", action="store_true", help="512 keys, two rounds of each")
    return parser.parse_args()


def _policy(
    asked: argparse.Namespace, model: torch.nn.Module, length: int
) -> tuple[Policy, float | None]:
    if asked.policy:
        return Policy.load(asked.policy), None
    batches = [sample(seed, length) for seed in range(1, 1 + asked.samples)]
    begin = time.perf_counter()
    policy = adaattn_compiler.calibrate(
        model, batches, budget=asked.budget, preset=asked.preset, progress=_say
    )
    if asked.save:
        policy.save(asked.save)
    return policy, time.perf_counter() - begin


def _say(stage: str, done: int, of: int) -> None:
    print(f"{stage} {done} of {of}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
