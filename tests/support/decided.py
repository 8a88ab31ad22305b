"""A small model whose heads differ, and policies for it made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adaattn_compiler.calibrate.board import Board, Tensors, exactly
from adaattn_compiler.decision import HeadDecision, Pattern, Precision, SiteDecision
from adaattn_compiler.kernels.envelope import guard_statistics, names
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.options import Options
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import Budget, Envelope, Policy, Provenance, Range, SitePolicy
from adaattn_compiler.spec_in_words import spec_in_words

WINDOW = HeadDecision(pattern=Pattern(64))
BF16 = HeadDecision(scores=Precision.BF16, values=Precision.BF16)
SLOPES = (1.0, 0.0)  # the first head looks at what is near, the second everywhere


class Layer(torch.nn.Module):
    """Causal attention with a bias by distance, of slopes of its own for each head."""

    def __init__(self, slopes: Sequence[float] = SLOPES, head_dim: int = 16) -> None:
        super().__init__()
        self.heads = len(slopes)
        width = self.heads * head_dim
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.register_buffer("slopes", torch.tensor(slopes)[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape
        q, k, v = (
            t.view(batch, rows, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        place = torch.arange(rows, device=x.device)
        distance = place[:, None] - place
        scores = q @ k.mT / q.shape[-1] ** 0.5 - self.slopes * distance
        weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(batch, rows, width)


class Stack(torch.nn.Module):
    """Layers one after another."""

    def __init__(self, depth: int = 2, slopes: Sequence[float] = SLOPES) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(slopes) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack(seed: int = 0, depth: int = 2, slopes: Sequence[float] = SLOPES) -> Stack:
    torch.manual_seed(seed)
    return Stack(depth, slopes).eval()


def inputs(batch: int = 1, rows: int = 256, seed: int = 1, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, rows, width, generator=torch.Generator().manual_seed(seed))


class Seen:
    """What the sites of a model are given."""

    def __init__(self, model: torch.nn.Module, *args: torch.Tensor) -> None:
        torch.compiler.reset()
        self.problems: dict[SiteKey, Problem] = {}
        self.tensors: dict[SiteKey, Tensors] = {}
        self.board = Board(model, Options(measure=False))
        self.result = self.board.run(args, {}, self._note)
        torch.compiler.reset()

    def _note(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        self.problems[key] = problem
        self.tensors[key] = tensors
        return exactly(key, problem, tensors)


def policy_for(
    seen: Seen,
    heads: Sequence[HeadDecision] = (WINDOW, BF16),
    *,
    budget: float = 0.1,
    room: float = 1.5,
    limit: float | None = None,
    statistics: Mapping[str, tuple[Range, ...]] | None = None,
) -> Policy:
    """The same decisions for every site that was seen, inside of what was seen, with some room."""
    sites = []
    for key, problem in seen.problems.items():
        q, k, v = seen.tensors[key][:3]
        shape = problem.shape
        found = guard_statistics(q, k, v)
        ranges = {
            name: tuple(
                Range(
                    float(a) / room,
                    min(float(b) * room, 0.9) if "mean" in name else float(b) * room,
                )
                for a, b in zip(low, high, strict=True)
            )
            for name, low, high in zip(names(), found.amin(1), found.amax(1), strict=True)
        }
        if limit is not None:
            ranges["audit_error"] = (Range(0, limit),) * shape.heads
        lengths = Range(q.shape[2] // 2, q.shape[2])
        sites.append(
            SitePolicy(
                key.name,
                key.ordinal,
                problem.spec.key(),
                shape.kv_heads,
                shape.head_dim,
                shape.value_dim,
                str(problem.dtype).removeprefix("torch."),
                SiteDecision(tuple(heads)),
                Envelope(lengths, lengths, ranges if statistics is None else statistics),
                (budget,) * shape.heads,
                (None,) * shape.heads,
                weights=seen.board.weights[key],
                computes=spec_in_words(problem.spec),
            )
        )
    return Policy(tuple(sites), PROVENANCE)


PROVENANCE = Provenance(
    {"adaattn": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    "a CPU",
    "0" * 32,
    "0" * 32,
    "2026-01-01",
    0,
    Budget("budget", 0.1),
)
