"""How long `explain` takes on a deep model: capture and analysis, without Inductor.

    python -m benchmarks.explain_time [--smoke] [--layers 32] [--length 512] [--threads N]

A random model of Llama's kind (LlamaForCausalLM, sdpa, width 512, 8 heads of 64 over 2). explain()
also runs the model once; it is called in a process that has compiled nothing before, with an empty
folder of measurements.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch

from benchmarks import families
from benchmarks.machine import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of explain() on a deep model.")
    parser.add_argument("--smoke", action="store_true", help="2 layers, N 64: does it run?")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    layers, length = (2, 64) if given.smoke else (given.layers, given.length)
    torch.set_num_threads(given.threads)
    print("\n".join(f"{name}: {value}" for name, value in describe_machine().items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        _explained(layers, length, folder)


def _explained(layers: int, length: int, folder: str) -> None:
    import adaattn_compiler

    torch.manual_seed(0)
    model = families.llama(layers)
    ids = torch.randint(families.VOCABULARY, (1, length))
    begin = time.perf_counter()
    with torch.no_grad():
        explanation = adaattn_compiler.explain(
            model, input_ids=ids, use_cache=False, options={"cache_dir": folder}
        )
    seconds = time.perf_counter() - begin
    lowered = sum(site.lowered for site in explanation.sites)
    passes = ", ".join(f"{name} {spent:.2f}" for name, spent in explanation.seconds.items())
    print(f"\n{layers} layers, N {length}: {lowered} of {len(explanation.sites)} sites lowered")
    print(f"passes, in seconds: {passes} (together {sum(explanation.seconds.values()):.2f})")
    print(f"explain: {seconds:.1f} s in all (bound for 32 layers: 15 s)")


if __name__ == "__main__":
    main()
