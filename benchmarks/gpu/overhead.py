"""What a call costs the host, where the attention itself is next to nothing.

Wall time of many calls and of waiting for the last, divided by their number; in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.subjects import with_own_code
from benchmarks.gpu.timed import Settings, failure
from benchmarks.gpu.timing import Call, spread

MODES = ("default", "reduce-overhead")
_CALLS, _ROUNDS = 200, 15
_BATCH, _HEADS, _LENGTH, _DIM = 1, 2, 32, 64


def measure(mode: str, settings: Settings) -> dict[str, Any]:
    """Microseconds a call of each subject under one mode of torch.compile."""
    found: dict[str, Any] = {"mode": mode, "subjects": {}}
    torch.compiler.reset()
    with torch.no_grad():
        calls = _prepared(mode, settings, found)
        if settings.warm:
            return found
        rounds = _rounds(calls, settings)
    for name, seconds in rounds.items():
        found["subjects"][name] |= {"host_us": spread([1e6 * s for s in seconds])}
    theirs = rounds.get("inductor, a user's Triton kernel")
    if theirs:
        found["ratios"] = {
            name: spread([t / o for t, o in zip(theirs, ours, strict=True)])
            for name, ours in rounds.items()
            if name.startswith("adaattn")
        }
    return found


def _prepared(mode: str, settings: Settings, found: dict[str, Any]) -> dict[str, Call]:
    size = (_BATCH, _LENGTH, _HEADS, _DIM)
    dtype = torch.float32 if settings.dry else torch.bfloat16
    qkv = [torch.randn(size, device=settings.device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    calls: dict[str, Call] = {}
    for name, make in _subjects(mode, settings):
        if settings.warm and not settings.takes(f"{mode} {name}"):
            continue
        try:
            call = make(qkv)
            for _ in range(3):  # a CUDA graph is recorded in the second call
                call()
            settings.stopwatch.synchronize()
        except Exception as error:
            found["subjects"][name] = failure(error)
        else:
            found["subjects"][name] = {}
            calls[name] = call
    return calls


def _rounds(calls: dict[str, Call], settings: Settings) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    count = 2 if settings.dry else _CALLS
    for turn in range(2 if settings.dry else _ROUNDS):
        names = list(calls)
        for name in names if turn % 2 == 0 else names[::-1]:
            times[name].append(_seconds(calls[name], count, settings))
        if settings.late:
            break
    return times


def _seconds(call: Call, count: int, settings: Settings) -> float:
    settings.stopwatch.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    settings.stopwatch.synchronize()
    return (time.perf_counter() - begin) / count


# -- subjects --------------------------------------------------------------------------------------

Make = Callable[[list[torch.Tensor]], Call]


def _subjects(mode: str, settings: Settings) -> Iterator[tuple[str, Make]]:
    """Beside each other: what torch offers, what we make of it, and a kernel of the user's own."""
    if mode == "default":
        yield "eager, SDPA", lambda qkv: lambda: _causal(*qkv)
    for backend in ("inductor", "adaattn"):
        yield f"{backend}, SDPA", _through(_causal, backend, mode, settings)
        yield f"{backend}, capped by hand", _through(_capped, backend, mode, settings)
    only_ours = {"kernels": "triton"}
    yield "adaattn, SDPA by Triton", _through(_causal, "adaattn", mode, settings, only_ours)
    yield "inductor, a user's Triton kernel", _users_kernel(mode, settings)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = 30.0 * torch.tanh(q @ k.transpose(-1, -2) * (_DIM**-0.5 / 30.0))
    above = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(above, float("-inf")).softmax(-1) @ v


def _through(
    function: Any,
    backend: str,
    mode: str,
    settings: Settings,
    options: dict[str, Any] | None = None,
) -> Make:
    def make(qkv: list[torch.Tensor]) -> Call:
        compiled = _compiled(function, backend, mode, settings, options)
        return lambda: compiled(*qkv)

    return make


def _compiled(
    function: Any,
    backend: str,
    mode: str,
    settings: Settings,
    options: dict[str, Any] | None = None,
) -> Any:
    function = with_own_code(function)
    if settings.dry:
        return torch.compile(function, backend="eager", dynamic=False)
    if options is None:
        return torch.compile(function, backend=backend, mode=mode, dynamic=False)
    if mode == "reduce-overhead":  # torch.compile takes a mode or options
        options = {**options, "triton.cudagraphs": True}
    return torch.compile(function, backend=backend, options=options, dynamic=False)


def _users_kernel(mode: str, settings: Settings) -> Make:
    def make(qkv: list[torch.Tensor]) -> Call:
        table = torch.zeros(1, 1, 1, 4, dtype=torch.int32, device=settings.device)
        blocks = torch.zeros(1, dtype=torch.int32, device=settings.device)
        if settings.dry:
            return lambda: qkv[0].clone()
        from benchmarks.gpu.bystander import bystander

        compiled = _compiled(bystander, "inductor", mode, settings)
        return lambda: compiled(*qkv, table, blocks)

    return make
