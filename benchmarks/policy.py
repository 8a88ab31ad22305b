"""What a policy gains and costs on the small trained model of the tests (tests/data/bytes_lm).

    python -m benchmarks.policy [--length 2048] [--samples 8] [--max-perplexity-change 0.001]
                                [--policy FILE] [--json FILE] [--smoke]

Calibrates on one half of the held-out text (or takes a policy), then measures on the other half:
the perplexity of the compiled model, exactly and under the policy; and the time of its attentions,
layer by layer on the tensors of one piece of text, all in one run, in turns:

  exact      our own exact float32 kernel
  inductor   torch.compile(backend="inductor") of the same scaled_dot_product_attention
  decided    under the policy, with guards and audits
  unguarded  the same without them: the difference is what they cost
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import adaattn_compiler
from adaattn_compiler.calibrate.apply import Applying
from adaattn_compiler.calibrate.board import Board, Tensors, exactly
from adaattn_compiler.kernels.cpu.decided import decided_runner
from adaattn_compiler.kernels.decided_kernel import DecidedKernel
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.options import Options
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.passes.decide import in_words
from adaattn_compiler.policy import Policy
from adaattn_compiler.runtime.state import new_state
from benchmarks.machine import describe_machine
from benchmarks.timing import Rounds, interleaved

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from bytes_lm import bytes_lm, samples

Call = Callable[[], object]


@dataclass(frozen=True)
class Site:
    """One attention of the model, with the tensors of one piece of text."""

    key: SiteKey
    problem: Problem
    tensors: Tensors


def main() -> None:
    asked = _asked()
    torch.manual_seed(0)
    model = bytes_lm()
    policy, seconds = _policy(asked, model)
    held_out = samples(1, asked.samples, asked.length)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "length": asked.length,
        "budget": policy.provenance.budget.value,
        "calibration_seconds": seconds,
        "perplexity": _perplexity(model, policy, held_out),
        "attention": _attention(model, policy, held_out[len(held_out) // 2], asked),
        "decisions": {site.name: in_words(site) for site in policy.sites},
        "stats": _demoted(model),
    }
    print(json.dumps(result, indent=1))
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=1) + "\n")


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-perplexity-change", type=float, default=0.001)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--policy", help="a policy's file, instead of calibrating")
    parser.add_argument("--save", help="where to write the policy that was calibrated")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each pair of calls")
    parser.add_argument("--json", help="a file for the result")
    parser.add_argument("--smoke", action="store_true", help="two rounds of each")
    return parser.parse_args()


def _policy(asked: argparse.Namespace, model: Any) -> tuple[Policy, float | None]:
    if asked.policy:
        return Policy.load(asked.policy), None
    batches = [
        {"input_ids": text, "use_cache": False} for text in samples(0, asked.samples, asked.length)
    ]
    begin = time.perf_counter()
    change = asked.max_perplexity_change
    policy = adaattn_compiler.calibrate(
        model, batches, max_perplexity_change=change, preset=asked.preset, progress=_say
    )
    if asked.save:
        policy.save(asked.save)
    return policy, time.perf_counter() - begin


def _say(stage: str, done: int, of: int) -> None:
    print(f"{stage} {done} of {of}", file=sys.stderr, flush=True)


# -- quality ---------------------------------------------------------------------------------------


def _perplexity(model: Any, policy: Policy, texts: list[torch.Tensor]) -> dict[str, float]:
    """Of the compiled model, exactly and under the policy, and the standard error of the change."""
    torch.compiler.reset()
    exact = _losses(torch.compile(model, backend="adaattn"), texts)
    torch.compiler.reset()
    decided = _losses(torch.compile(model, backend="adaattn", options={"policy": policy}), texts)
    change = (decided - exact).double()
    return {
        "exact": math.exp(float(exact.mean())),
        "policy": math.exp(float(decided.mean())),
        "change": math.expm1(float(change.mean())),
        "standard_error": float(change.std()) / math.sqrt(len(change)),
    }


def _losses(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    losses = []
    for text in texts:
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="none"))
    return torch.cat(losses)


def _demoted(model: Any) -> dict[str, list[dict[str, Any]]]:
    """What the heads met on the held-out text."""
    found = adaattn_compiler.stats(model)
    return {site.label: [asdict(head) for head in site.heads] for site in found.sites}


# -- time ------------------------------------------------------------------------------------------


def _attention(
    model: Any, policy: Policy, text: torch.Tensor, asked: argparse.Namespace
) -> dict[str, Any]:
    sites = _sites(model, text)
    calls: dict[str, Call] = {
        "exact": lambda: [exactly(site.key, site.problem, site.tensors) for site in sites],
        "inductor": _inductor(sites),
        "decided": _decided(sites, policy),
        "unguarded": _unguarded(sites, policy),
    }
    pairs = {
        "exact / decided": ("exact", "decided"),
        "inductor / decided": ("inductor", "decided"),
        "inductor / exact": ("inductor", "exact"),
        "decided / unguarded": ("decided", "unguarded"),
    }
    with torch.no_grad():
        return {
            name: _told(interleaved(calls[a], calls[b], asked.seconds, asked.smoke))
            for name, (a, b) in pairs.items()
        }


def _told(rounds: Rounds) -> dict[str, Any]:
    return {
        "ratio": rounds.ratio,
        "spread": rounds.spread,
        "milliseconds": [1e3 * min(rounds.theirs), 1e3 * min(rounds.ours)],
        "rounds": len(rounds.ours),
    }


def _sites(model: Any, text: torch.Tensor) -> list[Site]:
    found: list[Site] = []

    def note(key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        found.append(Site(key, problem, tensors))
        return exactly(key, problem, tensors)

    torch.compiler.reset()
    Board(model, Options(measure=False)).run((text,), {"use_cache": False}, note)
    return found


def _inductor(sites: list[Site]) -> Call:
    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    torch.compiler.reset()
    compiled = torch.compile(sdpa, backend="inductor")
    return lambda: [compiled(*site.tensors[:3]) for site in sites]


def _unguarded(sites: list[Site], policy: Policy) -> Call:
    decided = {site.key: _heads(policy, site) for site in sites}
    applying = Applying(decided)
    return lambda: [applying(site.key, site.problem, site.tensors) for site in sites]


def _heads(policy: Policy, site: Site) -> Any:
    found = policy.site(site.key.name, site.key.ordinal)
    assert found is not None
    return found.decision.heads


def _decided(sites: list[Site], policy: Policy) -> Call:
    """As compiled graphs call it: both ops, with a state for each site."""
    ops = torch.ops.adaattn
    given = []
    for site in sites:
        found = policy.site(site.key.name, site.key.ordinal)
        assert found is not None
        text = DecidedKernel(found, Options().audit_rows).plan(site.problem).serialize()
        decided_runner(text)
        given.append((site.tensors, new_state(site.problem.shape.heads), text))

    def call() -> list[torch.Tensor]:
        out = []
        for tensors, state, plan in given:
            flags = ops.check_envelope(*tensors[:3], state, plan)
            out.append(ops.attention_as_decided(*tensors, flags, state, plan))
        return out

    return call


if __name__ == "__main__":
    main()
