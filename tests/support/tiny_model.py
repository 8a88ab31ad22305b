"""A language model that calibrates in a second, and how processes of tests calibrate it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from adaattn_compiler.calibrate import chosen
from adaattn_compiler.calibrate.board import Tensors
from adaattn_compiler.calibrate.cli import main
from adaattn_compiler.calibrate.measure import Measuring, SiteMeasurements
from adaattn_compiler.calibrate.resume import Begun, Journal

HEADS, HEAD_DIM, LENGTH, VOCABULARY = 2, 32, 256, 16
SITES = ("layers.0", "layers.1")


class Layer(torch.nn.Module):
    """Causal attention; gain: of the scores, beyond 1/sqrt(D)."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.qkv = torch.nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(q * self.gain, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    """Two layers, and logits over the embeddings."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, HEADS * HEAD_DIM)
        self.layers = torch.nn.ModuleList([Layer(gain) for _ in SITES])

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return {"logits": x @ self.embed.weight.T}


def build(seed: int = 0, gain: float = 1.0) -> Model:
    torch.manual_seed(seed)
    return Model(gain).eval()


def build_other() -> Model:
    return build(seed=1)


def build_by_rank() -> Model:
    return build(seed=int(os.environ.get("RANK", "0")))


def build_none() -> torch.nn.Module:
    """Without attention."""
    return torch.nn.Embedding(VOCABULARY, 4)


def batches(count: int = 3) -> Iterator[dict[str, torch.Tensor]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield {"input_ids": torch.randint(VOCABULARY, (1, LENGTH), generator=generator)}


wrong = [(torch.full((1, LENGTH), VOCABULARY),)]
plain = [(torch.zeros(1, 8, dtype=torch.long),)]


def fixed_times(patch: pytest.MonkeyPatch) -> None:
    """Times that are always the same: the later a candidate, the faster."""

    def seconds_of(
        self: Measuring, site: SiteMeasurements, tensors: Tensors
    ) -> tuple[tuple[float, ...], ...]:
        heads = site.problem.shape.heads
        return tuple((0.002 / heads / (i + 1),) * heads for i in range(len(site.candidates)))

    patch.setattr(Measuring, "_seconds_of", seconds_of)
    patch.setattr(chosen, "least_seconds", lambda ways: [2e-3, 1e-3])


def killed_after(patch: pytest.MonkeyPatch, samples: int) -> None:
    """The process is killed as soon as so many samples are kept."""
    keep = Journal.keep

    def kept(self: Journal, begun: Begun) -> None:
        keep(self, begun)
        if len(begun.samples) >= samples:
            os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(Journal, "keep", kept)


def not_removed(patch: pytest.MonkeyPatch) -> None:
    """What was measured stays beside the policy."""
    patch.setattr(Journal, "remove", lambda self: None)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched:
        fixed_times(patched)
        not_removed(patched)
        if "KILLED_AFTER" in os.environ:
            killed_after(patched, int(os.environ["KILLED_AFTER"]))
        sys.exit(main(sys.argv[1:]))
