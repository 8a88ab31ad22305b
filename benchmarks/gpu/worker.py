"""The process that runs one section's cases, or compiles those of all sections in advance.

    python -m benchmarks.gpu.worker FILE SECTION [--dry-run]
    python -m benchmarks.gpu.worker FILE --warm I OF [--only SECTION ...]

The first imports what it needs and then waits for a line on its input, {"seconds", "cases"}: so
the next section's process starts while this one's still runs. What is found is appended to FILE, a
line of JSON for each event: {"case", "found"}, and {"begun"} before.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.plan import Section, chosen
from benchmarks.gpu.timed import DeviceLost, Settings, failure, is_lost
from benchmarks.gpu.timing import CudaStopwatch, HostStopwatch

# What the process ends with after an error from which CUDA does not recover.
LOST = 3


def run_cases(section: Section, names: list[str], settings: Settings, file: Path) -> int:
    """Each case by itself; the process's exit status."""
    for name in names:
        if settings.late:
            tell(file, case=name, found={"skipped": "out of time"})
            continue
        tell(file, begun=name)
        begin = time.perf_counter()
        try:
            found = section.cases[name](settings)
        except DeviceLost as error:
            found = error.found | failure(error)
        except Exception as error:
            found = failure(error)
        tell(file, case=name, found=found | {"seconds": time.perf_counter() - begin})
        if is_lost():
            return LOST
        _free()
    return 0


def tell(file: Path, **event: Any) -> None:
    """Append one event."""
    with file.open("a") as out:
        out.write(json.dumps(event) + "\n")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _warm(given: argparse.Namespace, seconds: float) -> None:
    """Compile the I-th of OF parts of what cases compile: caches on disk keep it."""
    torch.set_num_threads(1)  # as many processes as there are cores
    device = "cpu" if given.dry_run else "cuda"
    stopwatch = HostStopwatch() if given.dry_run else CudaStopwatch()
    deadline = time.monotonic() + seconds
    part = (given.warm[0], given.warm[1])
    settings = Settings(stopwatch, deadline, device, warm=True, dry=given.dry_run, part=part)
    for section in chosen(given.only):
        if run_cases(section, list(section.cases), settings, given.file) == LOST:
            return


def _serve(given: argparse.Namespace) -> int:
    """One section, once the word is given."""
    (section,) = chosen([given.section])
    _import()
    device = "cpu" if given.dry_run else "cuda"
    word = json.loads(sys.stdin.readline() or "null")
    if word is None:  # nobody waits for it any more
        return 0
    stopwatch = HostStopwatch() if given.dry_run else CudaStopwatch()
    deadline = time.monotonic() + word["seconds"]
    settings = Settings(stopwatch, deadline, device, dry=given.dry_run)
    return run_cases(section, word["cases"], settings, given.file)


def _import() -> None:
    """What cases need; if it is missing they say so themselves."""
    for module in ("torch._inductor.compile_fx", "adaattn_compiler.backend", "triton"):
        try:
            __import__(module)
        except Exception as error:
            print(f"{module} cannot be imported: {error!r}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("section", nargs="?")
    parser.add_argument("--warm", nargs=2, type=int)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.warm:
        _warm(given, given.seconds)
        return
    raise SystemExit(_serve(given))


if __name__ == "__main__":
    main()
