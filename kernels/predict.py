"""What an attention takes on a device that need not be there: counted, compiled, predicted.

Operations and bytes are counted (roofline.py); registers, shared memory and spills are read from
the generated kernel, which Triton compiles ahead of time. A time is a bound: the longest of what
can go on at the same time, at the rates of the device's data sheet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from adaattn_compiler.kernels.device import target_here
from adaattn_compiler.kernels.measure import first_line
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.roofline import Work, eager_bytes, work_of
from adaattn_compiler.kernels.triton.compile import Compiled, compiled_decode, compiled_forward
from adaattn_compiler.kernels.triton.kernel import TritonKernel
from adaattn_compiler.kernels.triton.launch import power_of_two
from adaattn_compiler.kernels.triton.plan import TritonPlan, plan_of, tables_of, tiles_for
from adaattn_compiler.target import DeviceTarget, cpu_target

# Blocks of rows and keys that are counted where no kernel says which: those of `cpp`; as many of
# each as do not take seconds.
_BLOCK, _MOST_BLOCKS = 64, 2048

# Products of float32 factors by their precision: whose rate they have, and how many make one.
_PRODUCTS = {
    "ieee": ("float32", 1),
    "tf32": ("tf32", 1),
    "tf32x3": ("tf32", 3),
    "bf16": ("bfloat16", 1),
    "fp16": ("float16", 1),
}

# What the code of tensor cores is called in PTX.
_TENSOR_CORES = {"wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}


@dataclass(frozen=True)
class Prediction:
    """One call of one attention, forward, on one device.

    device: its name, "H200 (sm_90)". operations: of both products, in the blocks that the mask
    leaves; density: their share. least_bytes: from and to memory, each tensor once. tile_bytes:
    what tiles read and write, from wherever. memory_bytes: which of the two the device's memory
    sees. eager_bytes: the same where each step's result is a tensor; saving: how
    many times memory_bytes that is. seconds: no less than that; bound: "products", "exponentials"
    or "memory", which of them takes so long; both None where the device multiplies no such numbers.

    Of the generated kernel, where it is asked for and can take the problem: tiles, rows by keys;
    warps and stages; registers of a thread, shared_memory of a program, and spilled, in bytes;
    tensor_cores: "wgmma", "mma.sync", or None where it uses none. refusal: why it cannot take it.
    note: why it was not compiled.
    """

    device: str
    operations: float
    density: float
    least_bytes: float
    tile_bytes: float
    memory_bytes: float
    eager_bytes: float
    saving: float
    seconds: float | None
    bound: str | None
    tiles: str | None = None
    warps: int | None = None
    stages: int | None = None
    registers: int | None = None
    shared_memory: int | None = None
    spilled: int | None = None
    tensor_cores: str | None = None
    refusal: str | None = None
    note: str | None = None


@functools.lru_cache(maxsize=256)
def counted(problem: Problem, target: DeviceTarget) -> Prediction:
    """What arithmetic says of a kernel that keeps scores on the chip, in blocks of 64 by 64 (larger
    ones beyond a length of 131072)."""
    block = max(_BLOCK, power_of_two(-(-max(problem.shape.hints[1:]) // _MOST_BLOCKS)))
    return _counted(problem, target, work_of(problem, block, block))


def counted_here(problem: Problem) -> Prediction:
    """The same for the device that the problem's tensors are on."""
    here = target_here() if problem.device == "cuda" else cpu_target(torch.get_num_threads())
    return counted(problem, here)


@functools.lru_cache(maxsize=256)
def predicted(problem: Problem, target: DeviceTarget) -> Prediction:
    """The same of the generated Triton kernel, were the tensors there; and what it compiles to."""
    if target.capability is None:
        return counted(problem, target)
    there = replace(problem, device="cuda")
    refused = TritonKernel(target).refusal(there)
    if refused is not None:
        return replace(counted(there, target), refusal=refused)
    plan = _plan(there, target)
    tiles = plan.tiles
    found = _counted(there, target, work_of(there, tiles.rows, tiles.keys), plan.precision)
    return replace(
        found,
        tiles=f"{tiles.rows}x{tiles.keys}",
        warps=tiles.warps,
        stages=tiles.stages,
        **_resources(there, plan, target.capability),
    )


def source_for(problem: Problem, target: DeviceTarget) -> str | None:
    """The Triton module that would run there; None where there is none."""
    there = replace(problem, device="cuda")
    kernel = TritonKernel(target)
    return None if kernel.refusal(there) is not None else kernel.source(there)


def _plan(problem: Problem, target: DeviceTarget) -> TritonPlan:
    return plan_of(problem, tiles_for(problem, target)[0], target)


# -- counted ---------------------------------------------------------------------------------------


def _counted(
    problem: Problem, target: DeviceTarget, work: Work, precision: str = "ieee"
) -> Prediction:
    times = _times(work, target, precision)
    bound = max(times, key=lambda name: times[name]) if times else None
    moved, eager = work.memory_bytes(target), eager_bytes(problem)
    return Prediction(
        device=_name(target),
        operations=work.operations,
        density=work.density,
        least_bytes=work.least_bytes,
        tile_bytes=work.tile_bytes,
        memory_bytes=moved,
        eager_bytes=eager,
        saving=eager / moved if moved else 1.0,
        seconds=None if bound is None else times[bound],
        bound=bound,
    )


def _name(target: DeviceTarget) -> str:
    if target.capability is None:
        return target.name
    return "{} (sm_{}{})".format(target.name, *target.capability)


def _times(work: Work, target: DeviceTarget, precision: str) -> dict[str, float]:
    """Those of `Work.times`, at the rate of the products' precision; none where it has no rate."""
    if work.dtype == "float32":
        dtype, products = _PRODUCTS[precision]
        work = replace(work, dtype=dtype, operations=products * work.operations)
    try:
        return work.times(target)
    except ValueError:
        return {}


# -- compiled --------------------------------------------------------------------------------------


def _resources(problem: Problem, plan: TritonPlan, capability: tuple[int, int]) -> dict[str, Any]:
    """The fields that say what the compiled kernel takes."""
    number = 10 * capability[0] + capability[1]
    dtype = str(problem.dtype).removeprefix("torch.")
    dims = (problem.shape.head_dim, problem.shape.value_dim)
    _, rows, columns = problem.shape.hints
    full_run = not plan.listed or tables_of(plan, rows, columns)[0].full_run
    try:
        compiled = _compiled(plan, number, dtype, dims, full_run, columns % plan.tiles.keys != 0)
    except Exception as error:
        return {"note": f"not compiled: {first_line(error)}"}
    used = (name for code, name in _TENSOR_CORES.items() if code in compiled.ptx)
    return {
        "registers": compiled.registers,
        "shared_memory": compiled.shared_memory,
        "spilled": compiled.spills,
        "tensor_cores": next(used, None),
    }


@functools.lru_cache(maxsize=64)
def _compiled(
    plan: TritonPlan,
    capability: int,
    dtype: str,
    dims: tuple[int, int],
    full_run: bool,
    ragged: bool,
) -> Compiled:
    """The kernel as the op launches it: beside the output, statistics are written in training."""
    given = (plan.made_for, dtype, dims, plan.tiles, capability)
    if plan.splits:
        return compiled_decode(*given, split=plan.splits > 1, precision=plan.precision)[0]
    return compiled_forward(
        *given,
        plan.precision,
        has_lse=False,
        has_statistics=plan.backward is not None,
        listed=plan.listed,
        full_run=full_run,
        ragged=ragged,
    )
