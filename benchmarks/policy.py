"""What a policy gains and costs on the small trained model of the tests (tests/data/bytes_lm).

    python -m benchmarks.policy [--length 2048] [--samples 8] [--max-perplexity-change 0.001]
                                [--policy FILE] [--json FILE] [--smoke]

Calibrates on one half of the held-out text (or takes a policy), then measures on the other half:
the perplexity of the compiled model, exactly and under the policy; and the time of its attentions,
layer by layer on the tensors of one piece of text, all in one run, in turns (attentions.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import adaattn_compiler
from adaattn_compiler.passes.decide import in_words
from adaattn_compiler.policy import Policy
from benchmarks.attentions import as_decided, compared, sites_of, ways
from benchmarks.machine import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from bytes_lm import bytes_lm, samples


def main() -> None:
    asked = _asked()
    torch.manual_seed(0)
    model = bytes_lm()
    policy, seconds = _policy(asked, model)
    held_out = samples(1, asked.samples, asked.length)
    perplexity = _perplexity(model, policy, held_out)
    stats = _demoted(model)
    sites = sites_of(model, (held_out[len(held_out) // 2],), {"use_cache": False})
    calls = ways(sites, policy)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "length": asked.length,
        "budget": policy.provenance.budget.value,
        "calibration_seconds": seconds,
        "perplexity": perplexity,
        "attention": compared(calls, asked.seconds, asked.smoke),
        "as_decided": as_decided(calls),
        "decisions": {site.name: in_words(site.decision.heads) for site in policy.sites},
        "stats": stats,
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


if __name__ == "__main__":
    main()
