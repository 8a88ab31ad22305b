"""Letting kernels compete on random data."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaattn_compiler.kernels.device import timer_of
from adaattn_compiler.kernels.problem import Kernel, Problem, Sizes
from adaattn_compiler.said import warn_once

log = logging.getLogger("adaattn_compiler")

# Rounds in which each kernel runs once; fewer where they take long, more where they are so short
# that a thread waiting for its turn is longer.
_ROUNDS, _LEAST_ROUNDS, _MOST_ROUNDS = 5, 3, 50
_MOST_SECONDS, _SHORT_SECONDS = 1.5, 0.1
# A first call of so many seconds is a measurement itself: what it does but once weighs little.
_LONG = 0.2
# Kernels whose long first call takes so many times the least are out.
_HOPELESS = 2.0
# A kernel's rounds differ by no more than this where nothing else disturbs them.
_STEADY = 1.6


def first_line(error: Exception) -> str:
    """An error in short."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@dataclass(frozen=True)
class Measured:
    """Seconds of one call by kernel name, and whether the machine was quiet enough to keep them."""

    times: dict[str, float]
    steady: bool


def measured(kernels: Sequence[Kernel], problem: Problem) -> Measured:
    """Each kernel's time, run in turns on random data; kernels that fail are left out.

    The least of the rounds: what else the machine does makes a call slower, never faster.
    """
    try:
        given = _random_inputs(problem)
    except torch.OutOfMemoryError as error:
        warn_once(f"kernels are not measured: {first_line(error)}")
        return Measured({}, False)
    calls = {kernel.label: _call(kernel, problem, given) for kernel in kernels}
    able = {name: call for name, call in calls.items() if call is not None}
    with torch.set_grad_enabled(problem.requires_grad):
        first = {name: _first_call(name, call) for name, call in able.items()}
        rounds = _rounds({n: t for n, t in first.items() if t is not None}, able, problem.device)
    return Measured(
        {name: min(seconds) for name, seconds in rounds.items()},
        all(_median(seconds) <= _STEADY * min(seconds) for seconds in rounds.values()),
    )


def _rounds(
    first: dict[str, float], calls: dict[str, Callable[[], object]], device: str
) -> dict[str, list[float]]:
    """Seconds of each round, given those of the first calls, which count where they are long."""
    if device == "cuda":  # there a first call compiles
        return _in_turns({name: calls[name] for name in first}, device=device)
    least = min(first.values(), default=0.0)
    if least <= _LONG:
        return _in_turns({name: calls[name] for name in first})
    near = {name: seconds for name, seconds in first.items() if seconds < _HOPELESS * least}
    if len(near) == 1 or sum(near.values()) > _MOST_SECONDS:
        return {name: [seconds] for name, seconds in near.items()}
    again = _in_turns({name: calls[name] for name in near}, 1)
    return {name: [near[name], *again[name]] for name in near}


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def _first_call(name: str, call: Callable[[], object]) -> float | None:
    """Its seconds; None where it fails."""
    begin = time.perf_counter()
    try:
        call()
        if torch.cuda.is_initialized():  # so that an error shows here, and not at another's call
            torch.cuda.synchronize()
    except Exception as error:
        warn_once(f"kernel {name} fails on random data: {first_line(error)}")
        log.debug("where it failed", exc_info=True)
        return None
    return time.perf_counter() - begin


def _in_turns(
    calls: dict[str, Callable[[], object]], most: int = _MOST_ROUNDS, device: str = "cpu"
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    timers = {name: timer_of(call, device) for name, call in calls.items()}
    begin = time.perf_counter()
    for turn in range(most):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            times[name].append(timers[name]())
        spent = time.perf_counter() - begin
        if turn + 1 >= _LEAST_ROUNDS and spent > _MOST_SECONDS:
            break
        if turn + 1 >= _ROUNDS and spent > _SHORT_SECONDS:
            break
    return times


Tensors = Sequence[torch.Tensor]


def _call(
    kernel: Kernel, problem: Problem, given: tuple[Tensors, Tensors]
) -> Callable[[], object] | None:
    """given: q, k and v; operands."""
    try:
        attention = kernel.build(problem)
    except Exception as error:
        warn_once(f"kernel {kernel.label} could not be built: {first_line(error)}")
        log.debug("where it failed", exc_info=True)
        return None
    (q, k, v), operands = given
    shape = problem.shape
    batch, rows, columns = shape.hints
    sizes = Sizes(batch, shape.heads, rows, columns, problem.param_hints)
    if not problem.requires_grad:
        return lambda: attention(q, k, v, operands, sizes)

    def both_ways() -> object:
        out = attention(q, k, v, operands, sizes)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return both_ways


def _random_inputs(problem: Problem) -> tuple[Tensors, Tensors]:
    """(q, k and v; operands), for all kernels the same ones, made where they are used: some hundred
    millions of numbers take the host seconds."""
    shape = problem.shape
    batch, rows, columns = shape.hints
    generator = torch.Generator(problem.device).manual_seed(0)

    def random(heads: int, length: int, dim: int) -> torch.Tensor:
        size = (batch, length, heads, dim)
        data = torch.randn(size, generator=generator, device=problem.device)
        return data.to(problem.dtype).transpose(1, 2).requires_grad_(problem.requires_grad)

    qkv = (
        random(shape.heads, rows, shape.head_dim),
        random(shape.kv_heads, columns, shape.head_dim),
        random(shape.kv_heads, columns, shape.value_dim),
    )
    operands = [
        torch.randn(sizes, generator=generator, device=problem.device).to(dtype)
        if dtype.is_floating_point
        else torch.ones(sizes, dtype=dtype, device=problem.device)
        for dtype, sizes in zip(problem.dtypes_of_operands(), problem.operand_shapes, strict=True)
    ]
    return qkv, operands
