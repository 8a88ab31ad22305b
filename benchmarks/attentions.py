"""The attentions of a model by themselves, on the tensors of one call: four ways to compute them.

exact      our own exact float32 kernel
inductor   torch.compile(backend="inductor") of the same scaled_dot_product_attention
decided    under a policy, with guards and audits
unguarded  the same without them: the difference is what they cost
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.calibrate.apply import Applying
from adaattn_compiler.calibrate.board import Board, Tensors, exactly
from adaattn_compiler.kernels.audit import relative_error
from adaattn_compiler.kernels.cpu.decided import decided_runner
from adaattn_compiler.kernels.decided_kernel import DecidedKernel
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.options import Options
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import Policy, SitePolicy
from adaattn_compiler.runtime.state import Column, new_state
from benchmarks.timing import Rounds, interleaved

Call = Callable[[], Sequence[torch.Tensor]]

# What is compared with what: of each pair, how many times faster the second is.
PAIRS = (
    ("exact", "decided"),
    ("inductor", "decided"),
    ("inductor", "exact"),
    ("decided", "unguarded"),
)


@dataclass(frozen=True)
class Site:
    """One attention of a model, with the tensors of one call."""

    key: SiteKey
    problem: Problem
    tensors: Tensors


def sites_of(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Site]:
    """All of them, as the model meets these inputs."""
    found: list[Site] = []

    def note(key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        found.append(Site(key, problem, tensors))
        return exactly(key, problem, tensors)

    torch.compiler.reset()
    Board(model, Options(measure=False)).run(args, dict(kwargs), note)
    return found


def ways(sites: list[Site], policy: Policy) -> dict[str, Call]:
    """The four calls by name; causal attention without a mask tensor."""
    return {
        "exact": lambda: [exactly(site.key, site.problem, site.tensors) for site in sites],
        "inductor": _inductor(sites),
        "decided": Decided(sites, policy),
        "unguarded": _unguarded(sites, policy),
    }


def compared(calls: Mapping[str, Call], seconds: float, smoke: bool) -> dict[str, Any]:
    """All pairs, the calls of each in turns, as plain values."""
    with torch.no_grad():
        return {
            f"{a} / {b}": _told(interleaved(calls[a], calls[b], seconds, smoke)) for a, b in PAIRS
        }


def errors(calls: Mapping[str, Call]) -> list[list[float]]:
    """Of what is decided against what is exact: relative, by site and head."""
    with torch.no_grad():
        pairs = zip(calls["decided"](), calls["exact"](), strict=True)
        return [relative_error(a.double(), b.double()).amax(0).tolist() for a, b in pairs]


def as_decided(calls: Mapping[str, Call]) -> list[list[float]]:
    """What guards and audits left as decided, as `Decided.as_decided` has it."""
    decided = calls["decided"]
    assert isinstance(decided, Decided)
    return decided.as_decided()


def _told(rounds: Rounds) -> dict[str, Any]:
    return {
        "ratio": rounds.ratio,
        "spread": rounds.spread,
        "milliseconds": [1e3 * min(rounds.theirs), 1e3 * min(rounds.ours)],
        "rounds": len(rounds.ours),
    }


def _inductor(sites: list[Site]) -> Call:
    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    torch.compiler.reset()
    compiled = torch.compile(sdpa, backend="inductor")
    return lambda: [compiled(*site.tensors[:3]) for site in sites]


def _unguarded(sites: list[Site], policy: Policy) -> Call:
    applying = Applying({site.key: _of(policy, site).decision.heads for site in sites})
    return lambda: [applying(site.key, site.problem, site.tensors) for site in sites]


def _of(policy: Policy, site: Site) -> SitePolicy:
    found = policy.site(site.key.name, site.key.ordinal)
    assert found is not None
    return found


class Decided:
    """As compiled graphs call it, with a state for each site."""

    def __init__(self, sites: list[Site], policy: Policy) -> None:
        self._given: list[tuple[Tensors, torch.Tensor, str]] = []
        for site in sites:
            kernel = DecidedKernel(_of(policy, site), Options().audit_rows)
            text = kernel.plan(site.problem).serialize()
            decided_runner(text)
            self._given.append((site.tensors, new_state(site.problem.shape.heads), text))

    def __call__(self) -> list[torch.Tensor]:
        guarded = torch.ops.adaattn.guarded_attention
        return [guarded(*tensors, state, plan) for tensors, state, plan in self._given]

    def as_decided(self) -> list[list[float]]:
        """The share of all calls up to now that were, by site and head: of the others the time is
        that of exact heads."""
        states = [state for _, state, _ in self._given]
        return [
            (state[:, Column.AS_DECIDED] / state[:, Column.CALLS].clamp(min=1)).tolist()
            for state in states
        ]
