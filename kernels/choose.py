"""Which kernel computes a problem."""

from __future__ import annotations

from dataclasses import dataclass

from adaattn_compiler.kernels.problem import Kernel, Problem
from adaattn_compiler.kernels.sdpa import SdpaKernel
from adaattn_compiler.options import Options
from adaattn_compiler.spec import Refusal


@dataclass(frozen=True)
class Choice:
    """The kernel chosen and why."""

    kernel: Kernel
    why: str


def kernels() -> tuple[Kernel, ...]:
    """Every kernel there is."""
    return (SdpaKernel(),)


def choose(problem: Problem, options: Options) -> Choice:
    """The best kernel for a problem; Refusal, with each kernel's reason, where none can take it."""
    reasons: list[str] = []
    able: list[Kernel] = []
    for kernel in kernels():
        if kernel.name not in options.kernels:
            reasons.append(f"{kernel.name}: not allowed by the options")
            continue
        reason = kernel.refusal(problem)
        if reason is None:
            able.append(kernel)
        else:
            reasons.append(f"{kernel.name}: {reason}")
    if not able:
        raise Refusal("no kernel can take it (" + "; ".join(reasons) + ")")
    best = min(able, key=lambda kernel: kernel.cost(problem))
    return Choice(best, "the only one" if len(able) == 1 else "least cost by estimate")
