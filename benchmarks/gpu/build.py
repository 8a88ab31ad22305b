"""Seconds until something runs for the first time, in new processes with caches of their own.

Each figure is of one process. Importing torch and AdaAttn, and making the device ready, is not in
it; `cold` finds empty caches, `warm` those that cold left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timed import Settings, failure

# By case, what is built: our kernel alone, or a function by torch.compile; of which attention.
CASES = {
    "kernel": {
        "causal D128": ("kernel", "causal"),
        "sinks and window D64": ("kernel", "sinks"),
    },
    "SDPA causal": {"adaattn": ("adaattn", "causal"), "inductor": ("inductor", "causal")},
    "capped by hand": {"adaattn": ("adaattn", "softcap"), "inductor": ("inductor", "softcap")},
}
_LENGTH = 1024
# With as many cores a case's processes run beside each other.
_MANY_CORES = 8


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Of each subject, cold and then warm."""
    if settings.warm:
        return {}
    subjects = CASES[name]
    at_once = len(subjects) if len(os.sched_getaffinity(0)) >= _MANY_CORES else 1
    with ThreadPoolExecutor(at_once) as threads:
        found = threads.map(lambda subject: _cold_and_warm(*subject, settings), subjects.values())
        return {"subjects": dict(zip(subjects, found, strict=True))}


def _cold_and_warm(what: str, form: str, settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            left = settings.deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError("out of time")
                found[f"{state}_seconds"] = _in_process(what, form, settings, folder, left)
            except Exception as error:
                return found | failure(error)
    return found


def _in_process(what: str, form: str, settings: Settings, folder: str, seconds: float) -> float:
    inherited = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_COMPILE_THREADS"}
    environment = {
        **inherited,
        "TORCHINDUCTOR_CACHE_DIR": folder,
        "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        "ADAATTN_CACHE_DIR": str(Path(folder) / "adaattn"),
    }
    command = [sys.executable, "-m", "benchmarks.gpu.build", what, form, settings.device]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=seconds
    )
    if done.returncode != 0:
        raise RuntimeError(f"{what}, {form}: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


# -- in the process that is measured ---------------------------------------------------------------


def _child(what: str, form: str, device: str) -> float:
    import adaattn_compiler.backend  # noqa: F401
    from benchmarks.gpu import forms
    from benchmarks.gpu.cases import Case, Inputs, Shape, Tiling
    from benchmarks.gpu.subjects import call_of, subjects

    dry = device == "cpu"
    made = {
        "causal": (forms.causal(128), Shape(1, 16, 16, _LENGTH, _LENGTH, 128)),
        "sinks": (forms.sinks(64, 8, 128), Shape(1, 64, 8, _LENGTH, _LENGTH, 64)),
        "softcap": (forms.softcap(128, 2, 50.0), Shape(1, 32, 16, _LENGTH, _LENGTH, 128)),
    }[form]
    ours = what == "kernel"
    tilings = (Tiling(128, 64, 8, 3),) if ours else ()
    case = Case(form, *made, () if ours else (what,), tilings)
    case = case.tiny() if dry else case
    inputs = Inputs.of(case, device)
    (subject,) = subjects(case, dry)
    if not dry:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call_of(case, subject.make(case, inputs), inputs)()
    if not dry:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
