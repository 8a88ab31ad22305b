"""Which kernel computes a problem: by its nature, by an estimate, or by measurement.

Kernels that cannot take the problem say why. Among the others, those whose estimated cost is far
above the least are left out, and so is what takes longer to build than another without promising to
be faster, and whatever has to be built for a problem too small to repay it. Where more than one is
left they run on random data of the problem's size, in turns, and the times are written to a table
on disk (one small file for each problem, replaced atomically), so that each is measured once on a
machine; not where the rounds differ much, as on a machine that is busy, and where all are far too
slow for their estimates it is these that choose.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adaattn_compiler.kernels import ops
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.device import is_present, target_here
from adaattn_compiler.kernels.flex import FlexKernel
from adaattn_compiler.kernels.measure import first_line, measured
from adaattn_compiler.kernels.problem import Kernel, Problem
from adaattn_compiler.kernels.sdpa import SdpaKernel
from adaattn_compiler.kernels.strips import StripsKernel
from adaattn_compiler.kernels.table import MeasurementTable
from adaattn_compiler.kernels.torch_backends import TORCH_BACKENDS
from adaattn_compiler.kernels.triton.kernel import TritonKernel
from adaattn_compiler.kernels.triton.op import triton_attention
from adaattn_compiler.options import Options
from adaattn_compiler.runtime.state import HEADS_ONLY, StateForm
from adaattn_compiler.said import warn_once
from adaattn_compiler.spec import Refusal

log = logging.getLogger("adaattn_compiler")

# Estimates are trusted beyond this ratio.
_SURELY_SLOWER = 6.0
# What takes longer to build takes part where its estimate is below this share of the best of those
# that are there sooner.
_WORTH_BUILDING = 0.9
# Operations below which nothing is worth building for (some tenths of a millisecond).
_SMALL = 3.0e7

# Of one core, about; a call that takes so many times as long, and some milliseconds, waited for
# others on the machine. Where calls are long that is small beside them.
_OPERATIONS_A_SECOND, _FAR = 1e11, 10.0
_LEAST_BY_WAITING, _MOST_BY_WAITING = 1e-3, 5e-2

# The ops must be registered wherever a kernel may be chosen.
OPS = (ops.attention, triton_attention)


@dataclass(frozen=True)
class Choice:
    """The kernel chosen and why; times in seconds where kernels were measured.

    decision: how exactly it computes, in words. refused: why not as a policy has it. stateful:
    whether it keeps a state of its heads; form: what is in it beside their rows.
    """

    kernel: Kernel
    why: str
    times: tuple[tuple[str, float], ...] = ()
    decision: str = "exact"
    stateful: bool = False
    refused: str | None = None
    form: StateForm = HEADS_ONLY


# Tiles of the generated Triton kernel that compete with each other.
_TRITON_VARIANTS = 3


def kernels(device: str = "cpu") -> tuple[Kernel, ...]:
    """Every kernel there is for a type of device."""
    if device != "cuda":
        return (SdpaKernel(), StripsKernel(), FlexKernel(), CppKernel())
    if torch.version.hip:  # AMD's are called so, too; nothing of ours was made for them
        return (SdpaKernel(),)
    ours = (TritonKernel(target_here(), variant) for variant in range(_TRITON_VARIANTS))
    return (SdpaKernel(), *TORCH_BACKENDS, FlexKernel.on_gpus(), *ours)


def prepare(problem: Problem, options: Options) -> None:
    """Start building what `choose` may want of a problem, beside what the caller does meanwhile."""
    with contextlib.suppress(Refusal):
        for kernel in _candidates(problem, options).kernels:
            kernel.prepare(problem)


def choose(problem: Problem, options: Options) -> Choice:
    """The best kernel for a problem; Refusal, with each kernel's reason, where none can take it."""
    candidates = _candidates(problem, options)
    settled = len(candidates.kernels) == 1 and not candidates.kernels[0].only_measured
    if settled or not _measures(problem, options):
        return _built([*candidates.kernels, *candidates.others], problem, candidates.why)
    return _fastest(candidates, problem, options)


@dataclass(frozen=True)
class _Candidates:
    """Kernels that may be the best, and the others, the least estimate first; why: if it is the
    first that is chosen."""

    kernels: list[Kernel]
    others: list[Kernel] = field(default_factory=list)
    why: str = "least cost by estimate"


def _candidates(problem: Problem, options: Options) -> _Candidates:
    able, unable = _able(problem, options)
    if len(able) == 1:
        return _Candidates(able, why=f"the only one that can ({'; '.join(unable)})")
    costs = {kernel: kernel.cost(problem) for kernel in able}
    able.sort(key=lambda kernel: costs[kernel])
    ready = [k for k in able if k.seconds_to_build == 0 and not k.only_measured]
    if ready and costs[ready[0]] < _SMALL:
        return _Candidates(ready[:1], why="least cost by estimate, and too small to measure")
    near = [
        kernel
        for kernel in able
        if costs[kernel] <= _SURELY_SLOWER * costs[able[0]] and _worth_building(kernel, costs)
    ]
    return _Candidates(near, [kernel for kernel in able if kernel not in near])


def _worth_building(kernel: Kernel, costs: Mapping[Kernel, float]) -> bool:
    sooner = [
        cost for other, cost in costs.items() if other.seconds_to_build < kernel.seconds_to_build
    ]
    return not sooner or costs[kernel] < _WORTH_BUILDING * min(sooner)


def _able(problem: Problem, options: Options) -> tuple[list[Kernel], list[str]]:
    """The kernels that can take a problem, and why each of the others cannot."""
    reasons: list[str] = []
    able: list[Kernel] = []
    for kernel in kernels(problem.device):
        reason = _refusal(kernel, problem, options)
        if reason is None:
            able.append(kernel)
        else:
            reasons.append(f"{kernel.label}: {reason}")
    if not able:
        raise Refusal("no kernel can take it (" + "; ".join(reasons) + ")")
    return able, reasons


def _refusal(kernel: Kernel, problem: Problem, options: Options) -> str | None:
    if kernel.name not in options.kernels:
        return "not allowed by the options"
    if kernel.only_measured and not _measures(problem, options):
        return "chosen by measurement only"
    return kernel.refusal(problem)


def _measures(problem: Problem, options: Options) -> bool:
    return options.measure and is_present(problem.device)


def _built(able: list[Kernel], problem: Problem, why: str) -> Choice:
    """The first kernel that can be built."""
    failures: list[str] = []
    for kernel in able:
        try:
            kernel.build(problem)
        except Exception as error:
            warn_once(f"kernel {kernel.label} could not be built: {first_line(error)}")
            log.debug("where it failed", exc_info=True)
            failures.append(f"{kernel.label} could not be built: {first_line(error)}")
            continue
        return Choice(kernel, why if not failures else "; ".join(failures))
    raise Refusal("; ".join(failures) or "none of the kernels that can take it runs here")


def _fastest(candidates: _Candidates, problem: Problem, options: Options) -> Choice:
    near = candidates.kernels
    table = MeasurementTable(options.cache_dir, problem.device)
    key = _key(near, problem)
    times = table.get(key)
    if times is None:
        found = measured(near, problem)
        if _is_disturbed(found.times, near, problem):
            why = f"{candidates.why}: other work disturbed the measurement"
            return _built([*near, *candidates.others], problem, why)
        times = found.times
        if times and found.steady:
            table.put(key, times)
    # What failed when it was run may be what only running could tell.
    rest = [k for k in (*near, *candidates.others) if k.label not in times and not k.only_measured]
    if not times:
        return _built(rest, problem, candidates.why)
    ran = [kernel for kernel in near if kernel.label in times]
    order = sorted(ran, key=lambda kernel: times[kernel.label]) + rest
    others = ", ".join(
        f"{name} {1e3 * t:.2f} ms" for name, t in sorted(times.items(), key=lambda i: i[1])
    )
    choice = _built(order, problem, f"measured: {others}")
    return Choice(choice.kernel, choice.why, tuple(sorted(times.items())))


def _is_disturbed(times: Mapping[str, float], near: Sequence[Kernel], problem: Problem) -> bool:
    """Whether all were so slow that threads must have waited for their turn, not for each other.

    Where every core is busy a parallel region ends when the system next lets its last thread run,
    some milliseconds later: steadily, so that rounds do not differ.
    """
    if not times or problem.device != "cpu":
        return False
    work = min(kernel.cost(problem) for kernel in near)
    expected = work / (_OPERATIONS_A_SECOND * torch.get_num_threads())
    return _MOST_BY_WAITING > min(times.values()) > _LEAST_BY_WAITING + _FAR * expected


def _key(near: list[Kernel], problem: Problem) -> str:
    """What a measurement holds for: the spec, sizes to a power of two, dtype, kernels, machine."""
    shape = problem.shape
    sizes = (
        *(1 << max(hint - 1, 0).bit_length() for hint in shape.hints),
        *(shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim),
    )
    names = sorted(kernel.label for kernel in near)
    dtypes = tuple(map(str, problem.dtypes_of_operands()))
    how = (str(problem.dtype), problem.device, problem.requires_grad, dtypes)
    text = repr((problem.spec.key(), sizes, how, names))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
