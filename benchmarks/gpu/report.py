"""The results: a JSON file that is written again after each case, and tables made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.memory import exponents

SCHEMA = 1
FLOOR = 0.98
_WIDTHS = (30, 42, 14, 10, 22, 0)
# Why there is no figure.
_REASONS = ("error", "skipped", "unavailable")
_TITLES = ("case", "subject", "median", "", "ratio (quartiles)", "")


class Report:
    """What was found so far. A section's status: "not run", "running", "done", or "incomplete"."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"schema": SCHEMA, **head, "sections": {}}

    def section(self, name: str, what: str) -> dict[str, Any]:
        """The record of a section, made where it is missing."""
        fresh = {"what": what, "budget_seconds": 0.0, "status": "not run", "cases": {}}
        record: dict[str, Any] = self.found["sections"].setdefault(name, fresh)
        return record

    def write(self) -> None:
        """Whole or not at all, so that a run that is killed leaves what it had."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.part")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(beside, self.path)


# -- tables ----------------------------------------------------------------------------------------


def head_lines(found: dict[str, Any]) -> list[str]:
    """The device and the versions."""
    device, versions = found["device"], found["versions"]
    smi = device.get("nvidia-smi", {})
    named = ", ".join(f"{name} {value}" for name, value in versions.items())
    lines = [
        f"device: {device['name']}, driver {smi.get('driver_version', 'unknown')}, "
        f"clocks {smi.get('clocks.sm', '?')} of {smi.get('clocks.max.sm', '?')}",
        f"versions: {named}",
        f"revision: {found['revision'] or 'unknown'}, sources {found['sources']}",
    ]
    if found.get("dry_run"):
        lines.append("dry run: on a CPU, at small sizes, with stand-ins; the figures mean nothing")
    return lines


def section_lines(name: str, record: dict[str, Any], markdown: bool = False) -> list[str]:
    """The table of one section."""
    status = record["status"] + (f": {record['error']}" if "error" in record else "")
    took = f"{record.get('seconds', 0):.0f} of {record['budget_seconds']:.0f} s, {status}"
    lines = ["", f"{'### ' if markdown else ''}{name}: {record['what']} ({took})"]
    rows = [row for case, found in record["cases"].items() for row in _rows(case, found)]
    if not rows:
        return lines
    lines += ["", _line(_TITLES, markdown), *(["|" + "---|" * len(_TITLES)] if markdown else [])]
    lines += [_line(row, markdown) for row in rows]
    return lines + [f"grows as N^{power:.2f}: {subject}" for subject, power in _powers(record)]


def _powers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from exponents(list(record["cases"].values())).items()


def _rows(case: str, found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for reason in _REASONS:
        if reason in found:
            yield case, f"{reason}: {found[reason]}", "", "", "", ""
    for name, subject in found.get("subjects", {}).items():
        marks = [mark for mark, holds in _marks(name, subject, found) if holds]
        ratio = found.get("ratios", {}).get(name)
        yield case, name, *_figures(subject), _ratio(ratio), ", ".join(marks)
        case = ""


def _marks(name: str, subject: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    yield "best kernel", name == found.get("best_kernel")
    yield "best baseline", name == found.get("best_baseline")
    yield "LESS ACCURATE THAN EAGER", not subject.get("accurate", True)


def _figures(subject: dict[str, Any]) -> tuple[str, str]:
    """The median, and the rate."""
    for reason in _REASONS:
        if reason in subject:
            return f"{reason}: {subject[reason][:90]}", ""
    if "host_us" in subject:
        return f"{subject['host_us']['median']:.1f} us", ""
    if "bytes" in subject:
        return f"{subject['bytes'] / 2**20:.1f} MiB", ""
    if "cold_seconds" in subject:
        return f"{subject['cold_seconds']:.2f} s", f"warm {subject.get('warm_seconds', 0):.2f} s"
    if "device_ms" not in subject:
        return "", ""
    rates = (("tflops", "TFLOPS"), ("terabytes_per_second", "TB/s"))
    rate = next((f"{subject[key]:.4g} {unit}" for key, unit in rates if key in subject), "")
    return f"{subject['device_ms']['median']:.4f} ms", rate


def _ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f}x ({ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f})"


def _line(cells: tuple[str, ...], markdown: bool) -> str:
    if markdown:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    widths = zip(cells, _WIDTHS, strict=True)
    return " ".join(cell.ljust(width) for cell, width in widths).rstrip()


def verdict_lines(found: dict[str, Any]) -> list[str]:
    """Which bound is kept, and what failed."""
    cases = [
        (f"{section}/{name}", case)
        for section, record in found["sections"].items()
        for name, case in record["cases"].items()
    ]
    subjects = list(_subjects(cases))
    wrong = [name for name, subject in subjects if not subject.get("accurate", True)]
    failed = [name for name, case in (*subjects, *cases) if "error" in case]
    left = [name for name, record in found["sections"].items() if record["status"] != "done"]
    return [
        "",
        _bound(cases),
        f"less accurate than eager: {', '.join(wrong) or 'none'}",
        f"errors: {', '.join(failed) or 'none'}",
        f"sections not done: {', '.join(left) or 'none'}",
    ]


def _bound(cases: list[tuple[str, Any]]) -> str:
    ratios = [
        (name, case["ratios"]["adaattn"]["median"])
        for name, case in cases
        if "adaattn" in case.get("ratios", {})
    ]
    below = [f"{name} {ratio:.2f}x" for name, ratio in ratios if ratio < FLOOR]
    said = f"below it {', '.join(below) or 'none'} (of {len(ratios)} cases)"
    return f"adaattn never below {FLOOR}x of the best baseline: {said}"


def _subjects(cases: list[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, case in cases:
        for subject, found in case.get("subjects", {}).items():
            yield f"{name} {subject}", found


def lines_of(found: dict[str, Any], markdown: bool = False) -> list[str]:
    """All of it."""
    tables = [
        line
        for name, record in found["sections"].items()
        for line in section_lines(name, record, markdown)
    ]
    return [*head_lines(found), *tables, *verdict_lines(found)]
