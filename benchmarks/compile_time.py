"""What analysis, rewriting and validation add to Inductor's compile time.

    python -m benchmarks.compile_time [--smoke] [--model NAME ...] [--threads N] [--repeats R]
                                      [--markdown] [--json FILE]

Every figure is of a fresh process. `cold` starts with empty caches (TORCHINDUCTOR_CACHE_DIR,
ADAATTN_CACHE_DIR), `warm` is a second process with the caches that the cold one left; inductor and
adaattn have caches of their own and take turns, and medians over the repeats are printed.

`first call` is what a user waits for: capture, backend and one run. `backend` is the part within
the call of the backend, without Dynamo's capture. `passes` is the time of ours that is no kernel:
expanding, canonical view, matching, validating, proving, rewriting. `kernels` is choosing, building
and measuring kernels (flex_attention's own compilation, for one), reported apart. So is `gc`:
capturing leaves Python's collector due, and its one long collection falls into whatever comes next,
our passes here, Inductor's own where there are none. The percentage is passes over Inductor's
`backend` time of the same run, cold or warm: the stricter of two readings (over its whole first
call it is less); the last column is all that a user waits for, ours over Inductor's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import families
from benchmarks.machine import describe_machine

MODELS = ("gpt2", "llama")
# What `lower` and its like call choosing and building kernels, in Analysis.seconds.
_KERNELS = "kernels"


@dataclass(frozen=True)
class Compilation:
    """Seconds of one process; passes: ours by name, empty for inductor."""

    first_call: float
    backend: float
    passes: dict[str, float]
    sites: int
    gc: float

    @property
    def own(self) -> float:
        """What ours took without kernels and without collecting garbage."""
        whole = sum(seconds for name, seconds in self.passes.items() if name != _KERNELS)
        return whole - self.gc

    @property
    def kernels(self) -> float:
        return self.passes.get(_KERNELS, 0.0)


@dataclass(frozen=True)
class Comparison:
    """The repeats of one model, cold or warm."""

    model: str
    caches: str
    inductor: tuple[Compilation, ...]
    adaattn: tuple[Compilation, ...]

    @property
    def own(self) -> float:
        return median(run.own for run in self.adaattn)

    @property
    def share(self) -> float:
        """Our passes as a part of Inductor's backend time."""
        return self.own / median(run.backend for run in self.inductor)

    @property
    def share_of_first_call(self) -> float:
        return self.own / median(run.first_call for run in self.inductor)

    @property
    def first_calls(self) -> float:
        """Our whole first call beside Inductor's."""
        ours, theirs = (
            median(run.first_call for run in runs) for runs in (self.adaattn, self.inductor)
        )
        return ours / theirs


def compared(model: str, layers: int, length: int, repeats: int, threads: int) -> list[Comparison]:
    """Cold and warm, the two backends in turns."""
    runs: dict[tuple[str, str], list[Compilation]] = {}
    for turn in range(repeats):
        order = ("inductor", "adaattn") if turn % 2 == 0 else ("adaattn", "inductor")
        for backend in order:
            with tempfile.TemporaryDirectory() as folder:
                for caches in ("cold", "warm"):
                    run = _in_process(model, backend, layers, length, threads, Path(folder))
                    runs.setdefault((caches, backend), []).append(run)
    return [
        Comparison(model, caches, tuple(runs[caches, "inductor"]), tuple(runs[caches, "adaattn"]))
        for caches in ("cold", "warm")
    ]


def _in_process(
    model: str, backend: str, layers: int, length: int, threads: int, folder: Path
) -> Compilation:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--threads", str(threads)]
    command += ["--child", model, backend, str(layers), str(length)]
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "ADAATTN_CACHE_DIR": str(folder / "adaattn"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{model}, {backend}: {done.stderr.strip()[-800:]}")
    return Compilation(**json.loads(done.stdout.splitlines()[-1]))


# -- in the process that is measured ---------------------------------------------------------------


def _child(model_name: str, backend_name: str, layers: int, length: int) -> Compilation:
    import adaattn_compiler.backend as ours

    torch.manual_seed(0)
    model = getattr(families, model_name)(layers)
    ids = torch.randint(families.VOCABULARY, (1, length))
    seconds, sites, passes = [0.0], [0], {}
    collecting = _Collecting()
    rewrite = ours.rewrite

    def recorded(*args: Any) -> Any:
        with collecting:
            analysis = rewrite(*args)
        sites[0] += sum(hasattr(result, "site") for result in analysis.results)
        for name, spent in analysis.seconds.items():
            passes[name] = passes.get(name, 0.0) + spent
        return analysis

    def timed(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        begin = time.perf_counter()
        try:
            if backend_name == "adaattn":
                return ours.adaattn(graph_module, inputs)
            return torch._TorchCompileInductorWrapper(None, None, None)(graph_module, inputs)
        finally:
            seconds[0] += time.perf_counter() - begin

    ours.rewrite = recorded
    begin = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=timed)(input_ids=ids, use_cache=False)
    first_call = time.perf_counter() - begin
    return Compilation(first_call, seconds[0], passes, sites[0], collecting.seconds)


class _Collecting:
    """The seconds that Python spends collecting garbage while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begin = 0.0

    def __enter__(self) -> None:
        gc.callbacks.append(self._note)

    def __exit__(self, *error: object) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begin = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._begin


# -- the report ------------------------------------------------------------------------------------

_COLUMNS = (
    "model",
    "caches",
    "inductor: first call",
    "backend",
    "adaattn: first call",
    "backend",
    "passes",
    "gc",
    "kernels",
    "passes / inductor's backend",
    "/ its first call",
    "first call: adaattn / inductor",
)


def _cells(row: Comparison) -> tuple[str, ...]:
    def middle(values: list[float]) -> str:
        low, high = min(values), max(values)
        spread = f" ({low:.1f}-{high:.1f})" if len(values) > 1 else ""
        return f"{median(values):.2f} s{spread}"

    both = (row.inductor, row.adaattn)
    times = [f([getattr(run, name) for run in runs]) for runs in both for f, name in _times(middle)]
    return (
        f"{row.model}, {row.adaattn[0].sites} sites",
        row.caches,
        *times,
        middle([run.own for run in row.adaattn]),
        middle([run.gc for run in row.adaattn]),
        middle([run.kernels for run in row.adaattn]),
        f"{100 * row.share:.1f}%",
        f"{100 * row.share_of_first_call:.1f}%",
        f"{row.first_calls:.2f}x",
    )


def _times(middle: Any) -> list[tuple[Any, str]]:
    return [(middle, "first_call"), (middle, "backend")]


def _passes_line(row: Comparison) -> str:
    names = dict.fromkeys(name for run in row.adaattn for name in run.passes)
    parts = (
        f"{name} {median(run.passes.get(name, 0.0) for run in row.adaattn):.2f}" for name in names
    )
    return f"passes of {row.model}, {row.caches}, in seconds: {', '.join(parts)}"


def _table(rows: list[Comparison], markdown: bool) -> list[str]:
    table = [_COLUMNS, *(_cells(row) for row in rows)]
    if markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in table]
        return [lines[0], "|" + "---|" * len(_COLUMNS), *lines[1:]]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(_COLUMNS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile time beside Inductor's.")
    parser.add_argument("--smoke", action="store_true", help="2 layers, once: does it run?")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        name, backend, layers, length = given.child
        print(json.dumps(asdict(_child(name, backend, int(layers), int(length)))))
        return
    layers, length, repeats = (
        (2, 64, 1) if given.smoke else (given.layers, given.length, given.repeats)
    )
    machine = describe_machine()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(
        f"{layers} layers of width {families.WIDTH}, N {length}, {repeats} repeat(s)\n", flush=True
    )
    rows = [r for m in given.model for r in compared(m, layers, length, repeats, given.threads)]
    print("\n".join(_table(rows, given.markdown)) + "\n")
    print("\n".join(_passes_line(row) for row in rows))
    if given.json is not None:
        found = {"machine": machine, "rows": [asdict(row) | {"share": row.share} for row in rows]}
        given.json.write_text(json.dumps(found, indent=1))
    above = [f"{r.model} {r.caches} {100 * r.share:.1f}%" for r in rows if r.share > 0.10]
    print(f"\nat most 10% of Inductor's compile time: above it {', '.join(above) or 'none'}")


if __name__ == "__main__":
    main()
