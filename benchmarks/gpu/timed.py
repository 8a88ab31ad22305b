"""One timed case: its subjects made and called, compared with float64, timed in turns."""

from __future__ import annotations

import math
import statistics
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Inputs
from benchmarks.gpu.subjects import Subject, call_of, subjects
from benchmarks.gpu.timing import Call, Sample, Stopwatch, in_turns, ratios, spread
from benchmarks.gpu.torchs import Unavailable

# What is compared: so many rows of the first batch item; gradients, of so many heads.
_ROWS_CHECKED, _HEADS_CHECKED = 64, 2


class DeviceLost(RuntimeError):
    """After such an error the process can do nothing more on the device; found: up to there."""

    def __init__(self, error: Exception, found: dict[str, Any]) -> None:
        super().__init__(str(error))
        self.found = found


@dataclass(frozen=True)
class Settings:
    """How cases are run.

    deadline: of `time.monotonic`, after which nothing new begins. seconds: of timing for each
    case. warm: compile and no more, of all that compiles the part with that number, of so many.
    dry: on a CPU, at small sizes.
    """

    stopwatch: Stopwatch
    deadline: float
    device: str = "cuda"
    seconds: float = 0.7
    warm: bool = False
    dry: bool = False
    part: tuple[int, int] = (0, 1)

    def takes(self, name: str) -> bool:
        """Whether what has that name is of this part."""
        number, count = self.part
        return zlib.crc32(name.encode()) % count == number

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """What a case showed, as JSON has it."""
    torch.compiler.reset()
    case = case.tiny() if settings.dry else case
    inputs = Inputs.of(case, settings.device)
    found: dict[str, Any] = {
        "shape": asdict(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "training": case.training,
        "attended": case.form.attended(case.shape.rows, case.shape.columns),
        "flop": case.flop,
        "subjects": {},
    }
    calls = _prepared(case, inputs, settings, found)
    if settings.warm or not calls:
        return found
    turns = in_turns(calls, settings.stopwatch, settings.seconds, *((2,) if settings.dry else ()))
    for name, error in turns.failures.items():
        found["subjects"][name] = failure(error)
        if is_lost():
            raise DeviceLost(error, found)
    for name, samples in turns.samples.items():
        found["subjects"][name] |= _figures(case, samples)
    found["explained"] = explained(case, inputs, settings)
    return found | compared(turns.samples, {s.name for s in subjects(case, settings.dry) if s.ours})


def _prepared(
    case: Case, inputs: Inputs, settings: Settings, found: dict[str, Any]
) -> dict[str, Call]:
    """The calls of the subjects that can take the case; what each costs and errs goes to found."""
    calls: dict[str, Call] = {}
    check = None if settings.warm else _Check(case, inputs)
    for subject in subjects(case, settings.dry):
        mine = subject.compiles and settings.takes(f"{case.name} {subject.name}")
        if settings.warm and not mine:
            continue
        if settings.late:
            found["subjects"][subject.name] = {"skipped": "out of time"}
            continue
        try:
            call, told = _made(case, subject, inputs, settings)
            found["subjects"][subject.name] = told
            if check is not None:
                told |= check.errors(call())
            calls[subject.name] = call
        except Exception as error:
            found["subjects"][subject.name] = failure(error)
            if is_lost():
                raise DeviceLost(error, found) from error
    return calls


def _made(
    case: Case, subject: Subject, inputs: Inputs, settings: Settings
) -> tuple[Call, dict[str, Any]]:
    """The call, having been called once, and the seconds that this took."""
    begin = time.perf_counter()
    call = call_of(case, subject.make(case, inputs), inputs)
    call()
    settings.stopwatch.synchronize()
    return call, {"seconds_until_called": time.perf_counter() - begin}


def failure(error: BaseException) -> dict[str, str]:
    """The record of what did not work."""
    text = " ".join(str(error).split())[:400]
    if isinstance(error, Unavailable):
        return {"unavailable": text}
    return {"error": f"{type(error).__name__}: {text}"}


def is_lost() -> bool:
    """Whether the device is of no more use to this process: after some errors it never answers."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception:
        return True
    return False


# -- against float64 -------------------------------------------------------------------------------


class _Check:
    """The exact result of some rows (or gradients of some heads), and how far eager is from it."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._exact = self._by_oracle(torch.float64)
        eager = self._by_oracle(case.dtype)
        self._eager = self._largest(eager)
        greatest = max(float(part.nan_to_num().abs().max()) for part in self._exact)
        self._tiny = 4 * torch.finfo(case.dtype).eps * greatest

    def errors(self, result: Any) -> dict[str, Any]:
        """The greatest differences from float64: of a result, and of eager in the same type."""
        parts = result if isinstance(result, tuple) else (result,)
        error = self._largest(tuple(self._checked(part) for part in parts))
        accurate = error <= 2 * self._eager + self._tiny  # not so where it is NaN
        told = error if math.isfinite(error) else None
        return {"error_from_float64": told, "of_eager": self._eager, "accurate": accurate}

    def _largest(self, parts: tuple[torch.Tensor, ...]) -> float:
        pairs = zip(parts, self._exact, strict=True)
        largest = [(part.double() - exact).abs().max() for part, exact in pairs]
        return float(torch.stack(largest).max())  # unlike Python's, it lets NaN through

    def _checked(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()[:1]
        return tensor[:, :_HEADS_CHECKED] if self._case.training else tensor[:, :, -_ROWS_CHECKED:]

    def _by_oracle(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        from adaattn_compiler.kernels.reference import reference_attention

        spec = self._case.form.spec
        if self._case.training:
            return self._gradients(dtype)
        q, k, v = (tensor[:1].to(dtype) for tensor in self._inputs.qkv)
        rows, whole = (min(q.shape[2], _ROWS_CHECKED), q.shape[2])
        operands = [o.to(torch.promote_types(dtype, torch.float32)) for o in self._inputs.operands]
        part = (whole - rows, whole)
        with torch.no_grad():
            return (reference_attention(q[:, :, -rows:], k, v, operands, (), spec, part),)

    def _gradients(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        from adaattn_compiler.kernels.reference import reference_attention

        assert self._inputs.grad_out is not None
        given = (*self._inputs.qkv, self._inputs.grad_out)
        q, k, v, grad = (tensor.detach()[:1, :_HEADS_CHECKED].to(dtype) for tensor in given)
        leaves = tuple(tensor.requires_grad_() for tensor in (q, k, v))
        out = reference_attention(*leaves, (), (), self._case.form.spec)
        return torch.autograd.grad(out, leaves, grad)


# -- what AdaAttn says of it -----------------------------------------------------------------------


def explained(case: Case, inputs: Inputs, settings: Settings) -> list[dict[str, Any]]:
    """What each attention was lowered to, and why; after timing, since it may reset Dynamo."""
    if settings.late or "adaattn" not in case.subjects:
        return []
    import adaattn_compiler

    options = {"kernels": "sdpa", "measure": False} if settings.dry else None
    given = (*inputs.qkv, *inputs.operands)
    try:
        with torch.set_grad_enabled(case.training):
            explanation = adaattn_compiler.explain(case.form.spelling, *given, options=options)
    except Exception as error:
        return [failure(error)]
    wanted = ("lowered", "kernel", "why", "reason", "mask", "score")
    return [{name: getattr(site, name) for name in wanted} for site in explanation.sites]


# -- figures ---------------------------------------------------------------------------------------


def _figures(case: Case, samples: list[Sample]) -> dict[str, Any]:
    device = spread([1e3 * sample.device for sample in samples])
    seconds = 1e-3 * device["median"]
    return {
        "device_ms": device,
        "host_ms": spread([1e3 * sample.host for sample in samples]),
        "rounds": len(samples),
        "tflops": case.flop / seconds / 1e12,
        "keys_gigabytes_per_second": case.bytes_of_keys / seconds / 1e9,
    }


def compared(samples: Mapping[str, list[Sample]], ours: set[str]) -> dict[str, Any]:
    """The fastest of others, the fastest of our direct launches, and ratios of all ours to the
    former: above 1 ours is faster."""
    medians = {
        name: statistics.median(s.device for s in found) for name, found in samples.items() if found
    }
    others = {name: seconds for name, seconds in medians.items() if name not in ours}
    kernels = {name: s for name, s in medians.items() if name.startswith("ours")}
    found: dict[str, Any] = {"best_kernel": _least(kernels)}
    found["best_baseline"] = best = _least(others)
    if best is not None:
        found["ratios"] = {
            name: ratios(samples[best], samples[name]) for name in medians if name in ours
        }
    return found


def _least(medians: Mapping[str, float]) -> str | None:
    return min(medians, key=lambda name: medians[name], default=None)
