"""Peak memory of one call beyond its inputs and its result, by the device's own allocator."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu import forms
from benchmarks.gpu.cases import USERS, Case, Inputs, Shape, Tiling
from benchmarks.gpu.subjects import call_of, subjects
from benchmarks.gpu.timed import DeviceLost, Settings, failure, is_lost
from benchmarks.gpu.timing import Call

LENGTHS = (8192, 16384, 32768, 65536)
_TILINGS = (Tiling(128, 64, 8, 3),)
# Attention by hand has all scores in memory: at the least length only.
_BY_HAND = "inductor"


def case(length: int) -> Case:
    """Causal attention of so many tokens, with capped scores, so that nothing but our kernel and
    flex_attention has a kernel for it."""
    names = (*USERS, "flex", *((_BY_HAND,) if length == LENGTHS[0] else ()))
    shape = Shape(1, 16, 16, length, length, 128)
    return Case(f"softcap_{length}", forms.softcap(128, 1, 50.0), shape, names, _TILINGS)


def plain_case(length: int) -> Case:
    """Causal attention that torch's SDPA has kernels for."""
    names = ("sdpa flash", "sdpa cudnn", *USERS)
    return replace(case(length), name=f"causal_{length}", form=forms.causal(128), subjects=names)


def measure(length: int, settings: Settings) -> dict[str, Any]:
    """Bytes of each subject, with and without something done to the scores."""
    found: dict[str, Any] = {"length": length, "subjects": {}}
    for made in (plain_case(length), case(length)):
        torch.compiler.reset()
        made = made.tiny() if settings.dry else made
        inputs = Inputs.of(made, settings.device)
        for subject in subjects(made, settings.dry):
            name = f"{made.name.rsplit('_', 1)[0]}: {subject.name}"
            mine = subject.compiles and settings.takes(f"{made.name} {subject.name}")
            if settings.warm and not mine:
                continue
            if settings.late:
                found["subjects"][name] = {"skipped": "out of time"}
                continue
            try:
                call = call_of(made, subject.make(made, inputs), inputs)
                found["subjects"][name] = {"bytes": peak(call, settings)}
            except Exception as error:
                found["subjects"][name] = failure(error)
                if is_lost():
                    raise DeviceLost(error, found) from error
    return found


def peak(call: Call, settings: Settings) -> int:
    """Bytes that one call takes at most, its result not counted; 0 on a CPU, which keeps no
    record. Called once before, so that compiling is not in it."""
    call()
    settings.stopwatch.synchronize()
    if settings.dry or settings.warm:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before - result.nbytes)


def exponents(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Of each subject the power of N by which its bytes grow, from the least length to the
    greatest: 1 is in proportion to N."""
    found: dict[str, float] = {}
    by_length = sorted((c for c in cases if "length" in c), key=lambda c: int(c["length"]))
    names = dict.fromkeys(name for c in by_length for name in c["subjects"])
    for name in names:
        points = [
            (c["length"], c["subjects"][name]["bytes"])
            for c in by_length
            if c["subjects"].get(name, {}).get("bytes", 0) > 0
        ]
        if len(points) > 1:
            (short, few), (long, many) = points[0], points[-1]
            found[name] = math.log(many / few) / math.log(long / short)
    return found
