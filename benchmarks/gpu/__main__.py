"""See the package's docstring; `--list` names the sections."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import ROOT, describe, result_name
from benchmarks.gpu.plan import chosen
from benchmarks.gpu.report import Report, head_lines, lines_of, section_lines, verdict_lines
from benchmarks.gpu.supervisor import Run, conduct

# Of a whole run; the sections' seconds are parts of it.
SECONDS = 330.0
_MOST_JOBS, _CORES_LEFT = 12, 2


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Attention on a GPU, side by side."
    )
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections")
    parser.add_argument("--list", action="store_true", help="the sections, and no more")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, small, with stand-ins")
    parser.add_argument("--jobs", type=int, help="processes that compile in advance, 0 for none")
    parser.add_argument("--json", type=Path, help="the file that is written")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--revision", help="of the sources, where git cannot tell")
    parser.add_argument("--show", type=Path, metavar="FILE", help="a file's tables, and no more")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/benchmarks.md")
    return parser.parse_args(given)


def _list(only: list[str] | None) -> None:
    for section in chosen(only):
        print(f"{section.name:10} {section.seconds:4.0f} s  {section.what}")
        print(f"{'':19}{', '.join(section.cases)}")


def _jobs(given: argparse.Namespace) -> int:
    if given.jobs is not None:
        return int(given.jobs)
    spare = len(os.sched_getaffinity(0)) - _CORES_LEFT
    return 0 if given.dry_run else max(min(spare, _MOST_JOBS), 0)


def _path(given: argparse.Namespace) -> Path:
    """A dry run's figures mean nothing: they are kept only where that is asked for."""
    if given.json is not None:
        return Path(given.json)
    folder = ROOT / "benchmarks" / "scratch" if given.dry_run else given.results
    return Path(folder) / f"{'dry_run' if given.dry_run else result_name()}.json"


def main(arguments: list[str] | None = None) -> None:
    given = _arguments(arguments)
    if given.list:
        return _list(given.only)
    if given.show:
        print("\n".join(lines_of(json.loads(given.show.read_text()), given.markdown)))
        return None
    if not given.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --dry-run shows that the code runs, and no figures")
    # An end that lets what was started be ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run = Run(chosen(given.only), given.seconds, _jobs(given), given.dry_run)
    report = Report(_path(given), describe(given.revision) | {"dry_run": given.dry_run})
    print("\n".join(head_lines(report.found)), flush=True)

    def say(name: str, record: dict[str, Any]) -> None:
        print("\n".join(section_lines(name, record, given.markdown)), flush=True)

    conduct(run, report, say)
    print("\n".join(verdict_lines(report.found)))
    print(f"written: {report.path}")
    return None


if __name__ == "__main__":
    main()
