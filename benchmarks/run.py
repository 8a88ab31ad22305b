"""Every case side by side with backend="inductor", in one run.

    python -m benchmarks.run [--case NAME ...] [--smoke] [--threads N] [--seconds S] [--json FILE]
                             [--against eager] [--markdown] [--list]
                             [--mkl-unlocked | --mkl-avx2]

--case takes names, or patterns such as 'masked_fill_*'; `memory` is the memory of attention.

Columns: `inductor` and `adaattn`, the median time of a call; `ratio`, how many times faster adaattn
is than inductor, the median over rounds in each of which both ran (timing.py), with the least and
the greatest; `error`, the greatest absolute difference from float64 of eager in the same type, of
inductor and of adaattn; `compile`, the first call of each, its Inductor caches empty (kernels that
an earlier case built in this process are not built again: compile_time.py measures compiling);
`kernel`, what explain() says computes the attention.

--against eager has eager in the place of inductor.

A case below 0.97 is run again for twice as long, and all its rounds count. The last line names the
cases that are below it then.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import torch

import adaattn_compiler
from benchmarks.cases import Case, cases
from benchmarks.machine import describe_machine, restart_with_mkl
from benchmarks.memory import MODELS, as_json, attention_memory, memory_lines
from benchmarks.timing import Rounds, interleaved
from benchmarks.workload import Compiled, Workload, error

FLOOR = 0.97
_BASELINES = ("inductor", "eager")
_MEMORY = "memory"


@dataclass(frozen=True)
class Row:
    """What a case showed. errors: eager, inductor, adaattn; compile_seconds: inductor, adaattn."""

    case: str
    what: str
    rounds: Rounds
    errors: tuple[float, float, float]
    compile_seconds: tuple[float, float]
    kernels: str

    def as_json(self) -> dict[str, Any]:
        summary = {"ratio": self.rounds.ratio, "spread": self.rounds.spread}
        return asdict(self) | summary


def measured(case: Case, baseline: str, seconds: float, smoke: bool) -> Row:
    """One case: compiled for both, compared with float64, timed in turns."""
    workload = case.workload(smoke)
    torch.compiler.reset()
    (theirs, first), (ours, second) = (_compiled(workload, name) for name in (baseline, "adaattn"))
    calls = (lambda: workload.call(theirs), lambda: workload.call(ours))
    rounds = interleaved(*calls, seconds, smoke)
    if rounds.ratio < FLOOR and not smoke:
        rounds += interleaved(*calls, 2 * seconds)
    return Row(
        case.name,
        case.what,
        rounds,
        _errors(workload, theirs, ours),
        (first, second),
        _kernels(workload),
    )


def _compiled(workload: Workload, backend: str) -> tuple[Compiled, float]:
    """The compiled module and the seconds of its first call."""
    from torch._inductor.utils import fresh_cache

    if backend == "eager":
        return workload.module, 0.0
    compiled = torch.compile(workload.module, backend=backend)
    begin = time.perf_counter()
    with fresh_cache():
        workload.call(compiled)
    return compiled, time.perf_counter() - begin


def _errors(workload: Workload, theirs: Compiled, ours: Compiled) -> tuple[float, float, float]:
    exact = workload.exact()
    eager, inductor, adaattn = (
        error(workload.call(call), exact) for call in (workload.module, theirs, ours)
    )
    return eager, inductor, adaattn


def _kernels(workload: Workload) -> str:
    """What computes the attentions, each said once."""
    with torch.set_grad_enabled(workload.training):
        explanation = adaattn_compiler.explain(workload.module, *workload.args, **workload.kwargs)
    said = [
        f"{site.kernel} ({site.mask})" if site.lowered else f"inductor: {site.reason}"
        for site in explanation.sites
    ]
    return "; ".join(dict.fromkeys(said)) or "no attention found"


def _warm_up() -> None:
    """What the first compilation of a process costs is no case's."""
    module = torch.nn.MultiheadAttention(64, 1, batch_first=True).eval()
    x = torch.randn(1, 8, 64)
    for backend in ("inductor", "adaattn"):
        with torch.no_grad():
            torch.compile(module, backend=backend)(x, x, x, need_weights=False)


# -- the report ------------------------------------------------------------------------------------


def _columns(baseline: str) -> tuple[str, ...]:
    return (
        "case",
        baseline,
        "adaattn",
        "ratio (min-max, rounds)",
        f"error: eager / {baseline} / adaattn",
        f"compile: {baseline} / adaattn",
        "kernel",
    )


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.rounds.spread
    return (
        row.case,
        _milliseconds(row.rounds.theirs),
        _milliseconds(row.rounds.ours),
        f"{row.rounds.ratio:.2f}x ({low:.2f}-{high:.2f}, {len(row.rounds.ours)})",
        " / ".join(f"{value:.1e}" for value in row.errors),
        " / ".join(f"{value:.1f} s" for value in row.compile_seconds),
        row.kernels,
    )


def _milliseconds(seconds: tuple[float, ...]) -> str:
    return f"{1e3 * median(seconds):.2f} ms"


# Of the columns as text; the last is as wide as it is.
_WIDTHS = (30, 11, 11, 26, 34, 28, 0)


def _line(cells: tuple[str, ...], markdown: bool) -> str:
    if markdown:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    widths = zip(cells, _WIDTHS, strict=True)
    return " ".join(cell.ljust(width) for cell, width in widths).rstrip()


def _head(machine: dict[str, str], baseline: str, markdown: bool) -> list[str]:
    lines = [f"{'- ' if markdown else ''}{name}: {value}" for name, value in machine.items()]
    named = "eager" if baseline == "eager" else f"backend={baseline}"
    note = f"ratio: times faster than {named} in the same round; above 1 adaattn is faster"
    return [*lines, "", note, ""]


def _titles(baseline: str, markdown: bool) -> list[str]:
    columns = _columns(baseline)
    rule = ["|" + "---|" * len(columns)] if markdown else []
    return [_line(columns, markdown), *rule]


def _verdict(rows: list[Row], baseline: str, failed: list[str]) -> str:
    below = [f"{row.case} {row.rounds.ratio:.2f}x" for row in rows if row.rounds.ratio < FLOOR]
    verdict = "none" if not below else ", ".join(below)
    floor = f"never below {FLOOR}x of {baseline.capitalize()}"
    text = f"{floor}: below it {verdict} (of {len(rows)} cases)"
    return text + (f"; failed: {', '.join(failed)}" if failed else "")


# -- the command -----------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Cases side by side with Inductor."
    )
    parser.add_argument("--case", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--smoke", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each case")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    parser.add_argument("--against", choices=_BASELINES, default="inductor")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/benchmarks.md")
    parser.add_argument("--list", action="store_true", help="the cases, and no more")
    mkl = parser.add_mutually_exclusive_group()
    mkl.add_argument("--mkl-unlocked", action="store_true", help="see machine.py")
    mkl.add_argument("--mkl-avx2", action="store_true", help="see machine.py")
    return parser.parse_args()


def _chosen(patterns: list[str]) -> list[Case]:
    return [case for case in cases() if any(fnmatch(case.name, p) for p in patterns)]


def _run_cases(chosen: list[Case], given: argparse.Namespace) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    failed: list[str] = []
    for case in chosen:
        try:
            rows.append(measured(case, given.against, given.seconds, given.smoke))
            print(_line(_cells(rows[-1]), given.markdown), flush=True)
        except Exception:
            failed.append(case.name)
            traceback.print_exc()
        gc.collect()
    return rows, failed


def _run_memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    length = 256 if given.smoke else 2048
    rows = [attention_memory(model, length, given.threads) for model in MODELS]
    print("\n" + "\n".join(memory_lines(rows)), flush=True)
    return [as_json(row) for row in rows]


def main() -> None:
    given = _arguments()
    if given.list:
        print("\n".join(f"{case.name:32}{case.what}" for case in cases()))
        return
    if given.mkl_unlocked or given.mkl_avx2:
        restart_with_mkl("unlocked" if given.mkl_unlocked else "avx2", "benchmarks.run")
    chosen = _chosen(given.case)
    memory = any(fnmatch(_MEMORY, pattern) for pattern in given.case)
    if not chosen and not memory:
        raise SystemExit(f"no case is named {' '.join(given.case)}: --list shows the names")
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        # Kernels are measured in this run, on this machine as it is.
        os.environ.setdefault("ADAATTN_CACHE_DIR", folder)
        _report(chosen, memory, given)


def _report(chosen: list[Case], memory: bool, given: argparse.Namespace) -> None:
    machine = describe_machine()
    print("\n".join(_head(machine, given.against, given.markdown)), flush=True)
    if chosen:
        _warm_up()
        print("\n".join(_titles(given.against, given.markdown)), flush=True)
    rows, failed = _run_cases(chosen, given)
    memories = _run_memory(given) if memory else []
    if given.json is not None:
        found = {"machine": machine, "smoke": given.smoke, "command": sys.argv[1:]}
        found |= {"cases": [row.as_json() for row in rows], "memory": memories, "failed": failed}
        given.json.write_text(json.dumps(found, indent=1))
    if given.smoke:
        print("\nsmoke: it runs; at these sizes and with two rounds the figures mean nothing")
    if chosen:
        print("\n" + _verdict(rows, given.against, failed))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
