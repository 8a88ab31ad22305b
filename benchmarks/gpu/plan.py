"""The sections, in the order in which they run, and the seconds that each may take.

The seconds are shares: `--seconds` stretches or shrinks them all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from benchmarks.gpu import build, cases, ceilings, memory, overhead, timed
from benchmarks.gpu.cases import Case
from benchmarks.gpu.timed import Settings

Run = Callable[[Settings], dict[str, Any]]
# What compiling everything in advance, on all cores, may take of the time.
PREPARING = 75.0


@dataclass(frozen=True)
class Section:
    """cases: by name, what each does under some settings. what: one line for the reader."""

    name: str
    what: str
    seconds: float
    cases: dict[str, Run]


@cache
def sections() -> tuple[Section, ...]:
    """All of them."""
    return (
        Section(
            "ceilings",
            "what the device reaches: a copy, a product of matrices",
            8,
            {"ceilings": partial(ceilings.measure, "ceilings")},
        ),
        Section(
            "dense",
            "plain and causal, bf16, 32k tokens, D 64, 128, 256, beside each SDPA backend",
            85,
            _timed(cases.dense()),
        ),
        Section(
            "window",
            "a window of 4096 at 32k, beside a mask in memory, flex_attention and flash",
            15,
            _timed(cases.window()),
        ),
        Section(
            "modified",
            "sinks, softcap, ALiBi by hand, beside flex_attention and Inductor",
            30,
            _timed(cases.modified()),
        ),
        Section(
            "backward", "forward and backward, causal, 2k and 8k", 25, _timed(cases.backward())
        ),
        Section(
            "decode",
            "one query row, 4k to 64k keys, eight heads to one, beside SDPA and flex_attention",
            20,
            _timed(cases.decode()),
        ),
        Section(
            "memory",
            "peak bytes beyond inputs and result, 8k to 64k",
            25,
            {str(length): partial(memory.measure, length) for length in memory.LENGTHS},
        ),
        Section(
            "overhead",
            "microseconds of host time for a call of next to nothing",
            25,
            {mode: partial(overhead.measure, mode) for mode in overhead.MODES},
        ),
        Section(
            "build",
            "seconds until a first result, caches cold and warm",
            45,
            {name: partial(build.measure, name) for name in build.CASES},
        ),
    )


def _timed(found: tuple[Case, ...]) -> dict[str, Run]:
    return {case.name: partial(timed.measure, case) for case in found}


def chosen(names: list[str] | None) -> tuple[Section, ...]:
    """The sections of those names, or all; SystemExit for a name that none has."""
    known = [section.name for section in sections()]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SystemExit(f"no section {', '.join(unknown)}: there are {', '.join(known)}")
    return tuple(section for section in sections() if not names or section.name in names)


def budget(this: float, following: tuple[Section, ...], left: float) -> float:
    """The seconds of what takes `this` in the plan, of those left for it and for what follows: what
    one section does not use is for the others."""
    return max(left, 0.0) * this / (this + sum(section.seconds for section in following))
