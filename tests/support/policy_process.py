"""A process of its own that runs one model under policies, one after another.

    python policy_process.py POLICY ...        ("-" for none)

Prints for each a line of JSON: the fingerprint of the result, how many graphs came from torch's
caches, and how many heads ran as decided.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from decided import inputs, stack
from torch._dynamo.utils import counters

import adaattn_compiler


def main(policies: list[str]) -> None:
    torch.set_num_threads(1)
    for policy in policies:
        print(json.dumps(_run(policy)), flush=True)


def _run(policy: str) -> dict[str, Any]:
    torch.compiler.reset()
    counters.clear()
    options: dict[str, Any] = {"measure": False, "kernels": "cpp"}
    if policy != "-":
        options["policy"] = policy
    model = stack(depth=1)
    with torch.no_grad():
        out = torch.compile(model, backend="adaattn", options=options)(inputs())
    hits = (
        counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    )
    return {
        "result": fingerprint(out),
        "hits": hits,
        "as_decided": 0 if policy == "-" else _as_decided(model),
    }


def fingerprint(result: torch.Tensor) -> str:
    return hashlib.blake2b(result.numpy().tobytes()).hexdigest()


def _as_decided(model: torch.nn.Module) -> int:
    (site,) = adaattn_compiler.stats(model).sites
    return sum(head.as_decided for head in site.heads)


if __name__ == "__main__":
    main(sys.argv[1:])
