"""Building one generated kernel, and loading it again.

    python -m benchmarks.build_time [--repeats R]

Each figure is the median over R new processes (5 unless told): `cold`, the seconds of making and
loading the library where the cache folder is empty; `warm`, those of loading it where it is full.
Importing torch and AdaAttn is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from statistics import median

from benchmarks.machine import describe_machine

_SCRIPT = """
import json, sys, time
import torch
from adaattn_compiler.kernels.cpu.library import library
from adaattn_compiler.kernels.cpu.source import Configuration, gradient_source_of, source_of
from adaattn_compiler.spec import AttentionSpec, k, q
import sympy

spec = AttentionSpec(0.125, mask=sympy.And(sympy.Ge(q - k, 0), sympy.Ge(k - q + 511, 0)))
make = {"forward": source_of, "backward": gradient_source_of}[sys.argv[1]]
begin = time.perf_counter()
library(make(Configuration(spec, sys.argv[2], 64, 64, ())))
print(json.dumps(time.perf_counter() - begin))
"""


def seconds(which: str, dtype: str, folder: str) -> float:
    """Of making and loading one library in a new process, with that cache folder."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    command = [sys.executable, "-c", _SCRIPT, which, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build_time")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("\n".join(f"{name}: {value}" for name, value in describe_machine().items()), end="\n\n")
    for which in ("forward", "backward"):
        for dtype in ("float32", "bfloat16"):
            cold, warm = [], []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    cold.append(seconds(which, dtype, folder))
                    warm.append(seconds(which, dtype, folder))
            print(
                f"{which:9} {dtype:9} cold {median(cold):.2f} s ({min(cold):.2f}-{max(cold):.2f}), "
                f"warm {1e3 * median(warm):.1f} ms "
                f"({1e3 * min(warm):.1f}-{1e3 * max(warm):.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
