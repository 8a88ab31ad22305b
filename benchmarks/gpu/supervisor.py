"""Runs the sections: each in a process of its own, within its time, whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import ROOT, clocks
from benchmarks.gpu.plan import PREPARING, Section, budget
from benchmarks.gpu.report import Report
from benchmarks.gpu.worker import LOST

# A section that has not ended by itself so many seconds after its time is ended; with less time
# than this left none begins.
GRACE, LEAST = 15.0, 2.0
_POLL = 0.05


class Worker:
    """One process of worker.py, started and waiting."""

    def __init__(self, section: str, folder: Path, dry: bool) -> None:
        handle, name = tempfile.mkstemp(prefix=f"{section}_", suffix=".jsonl", dir=folder)
        os.close(handle)
        self.file = Path(name)
        self._log = self.file.with_suffix(".log")
        arguments = [str(self.file), section, *(["--dry-run"] if dry else [])]
        self.process = started(arguments, folder, self._log, folder / "measurements")

    def go(self, seconds: float, cases: list[str]) -> None:
        """The word it waits for; if the process has ended already, `events` shows that."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(json.dumps({"seconds": seconds, "cases": cases}) + "\n")
            self.process.stdin.close()

    def events(self, until: float) -> Iterator[dict[str, Any]]:
        """As they are written, until the process ends or is ended."""
        seen = 0
        while True:
            running = self.process.poll() is None
            lines = self.file.read_text().split("\n")[:-1]
            for line in lines[seen:]:
                yield json.loads(line)
            seen = len(lines)
            if not running:
                return
            if time.monotonic() > until:
                end(self.process)
            time.sleep(_POLL)

    def last_words(self) -> str:
        """The end of what it printed."""
        return " ".join(self._log.read_text(errors="replace").split())[-300:]


def started(
    arguments: list[str], folder: Path, log: Path, measurements: Path
) -> subprocess.Popen[str]:
    """A process of worker.py whose caches of compiled code are in a folder."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "ADAATTN_CACHE_DIR": str(measurements),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def end(process: subprocess.Popen[str]) -> None:
    """The process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Run:
    """seconds: of all. jobs: processes that compile in advance, 0 for none."""

    sections: tuple[Section, ...]
    seconds: float
    jobs: int = 0
    dry: bool = False


def conduct(run: Run, report: Report, say: Callable[[str, dict[str, Any]], None]) -> None:
    """Every section in turn, the report written after each case; say: of each that has ended."""
    end_at = time.monotonic() + run.seconds
    for section in run.sections:
        report.section(section.name, section.what)
    report.write()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, _workers() as alive:
        folder = Path(name)
        ready = _hired(run.sections[0], folder, run.dry, alive)
        if run.jobs:
            seconds = budget(PREPARING, run.sections, run.seconds)
            report.found["prepared_seconds"] = _compile(run, folder, seconds, alive)
            report.write()
        for place, section in enumerate(run.sections):
            worker, following = ready, run.sections[place + 1 :]
            if following:
                ready = _hired(following[0], folder, run.dry, alive)
            seconds = budget(section.seconds, following, end_at - time.monotonic())
            record = report.section(section.name, section.what)
            record["budget_seconds"] = seconds
            _attend(section, worker, seconds, record, report, (folder, run.dry, alive))
            say(section.name, record)


@contextmanager
def _workers() -> Iterator[list[subprocess.Popen[str]]]:
    """Those started, none of which outlives this."""
    alive: list[subprocess.Popen[str]] = []
    try:
        yield alive
    finally:
        for process in alive:
            if process.poll() is None:
                end(process)


def _hired(section: Section, folder: Path, dry: bool, alive: list[Any]) -> Worker:
    worker = Worker(section.name, folder, dry)
    alive.append(worker.process)
    return worker


def _attend(
    section: Section,
    worker: Worker,
    seconds: float,
    record: dict[str, Any],
    report: Report,
    hiring: tuple[Path, bool, list[Any]],
) -> None:
    """One section. Where its process ends before its cases do, another takes up those left: each
    has done one, or failed at one, or nothing could be begun."""
    begin = time.monotonic()
    left = list(section.cases)
    record["status"] = "running"
    while left:
        remaining = begin + seconds - time.monotonic()
        if remaining < LEAST:
            record["error"] = "out of time"
            break
        worker.go(remaining, left)
        before = len(left)
        begun = _followed(worker, begin + seconds + GRACE, left, record, report)
        if begun is not None:
            left.remove(begun)
            record["cases"][begun] = {"error": _end_of(worker)}
        elif left and len(left) == before:
            record["error"] = _end_of(worker)
            break
        if left:
            worker = _hired(section, *hiring)
    for name in left:
        record["cases"][name] = {"skipped": record["error"]}
    done = all("error" not in c and "skipped" not in c for c in record["cases"].values())
    record |= {"status": "done" if done else "incomplete", "seconds": time.monotonic() - begin}
    record["clocks_after"] = clocks()
    report.write()
    end(worker.process)


def _followed(
    worker: Worker, until: float, left: list[str], record: dict[str, Any], report: Report
) -> str | None:
    """Enter what the worker finds, until it ends; the case that it began and did not finish."""
    begun = None
    for event in worker.events(until):
        if "begun" in event:
            begun = event["begun"]
            continue
        record["cases"][event["case"]] = event["found"]
        left.remove(event["case"])
        begun = None
        report.write()
    return begun


def _end_of(worker: Worker) -> str:
    """How a process ended that had more to do."""
    code = worker.process.returncode
    if code == -signal.SIGKILL:
        return "out of time, or killed"
    lost = "the device was lost" if code == LOST else f"status {code}"
    return f"its process ended, {lost}: {worker.last_words()}"


def _compile(run: Run, folder: Path, seconds: float, alive: list[Any]) -> float:
    """Seconds that compiling everything in advance took; what is not done by then is left."""
    begin = time.monotonic()
    processes = []
    for part in range(run.jobs):
        arguments = [str(folder / f"warm_{part}.jsonl"), "--warm", str(part), str(run.jobs)]
        arguments += ["--seconds", str(seconds), "--only", *(s.name for s in run.sections)]
        arguments += ["--dry-run"] if run.dry else []
        log, measurements = folder / f"warm_{part}.log", folder / f"measurements_{part}"
        processes.append(started(arguments, folder, log, measurements))
    alive += processes
    while any(p.poll() is None for p in processes) and time.monotonic() < begin + seconds:
        time.sleep(_POLL)
    for process in processes:
        if process.poll() is None:
            end(process)
    return time.monotonic() - begin
